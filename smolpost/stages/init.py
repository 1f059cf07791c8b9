"""A start checkpoint from nothing: a tokenizer built from the pipeline's own data, and random weights."""

import dataclasses
from dataclasses import dataclass, field

from smolpost.schema import RELEASE_DAY, Recipe, choice, count, seeded
from smolpost.stages.base import Stage, Work, stage_kind


@stage_kind
@dataclass
class InitStage(Stage):
    kind: str = "init"
    tokenizer: str = choice("bpe", "char")  # byte-level BPE, or one token per character
    vocab_size: int = count(8192)  # tokens, special ones included; the target for bpe, ignored by char
    tokenizer_data: list[str] = field(default_factory=list)  # mixtures whose text the tokenizer is built from
    template: str = "chatml"  # chat template stored with the checkpoint
    seed: int = seeded(0)

    VERSION = 1

    def mixtures(self):
        return [("tokenizer_data", name) for name in self.tokenizer_data]

    def rows_read(self, mixture):
        from smolpost.data.mixtures import rows_alone

        return rows_alone(mixture)

    def key_parts(self, keys, stage):
        from smolpost.chat.render import load_template

        return {"template": load_template(self.template), "architecture": keys.recipe.model.architecture}

    def make(self, work: Work):
        import torch

        from smolpost.model import SmolLM3ForCausalLM

        texts = _texts(work, self._tokenizer([]))  # an empty one has the special tokens that templates read
        tokenizer = self._tokenizer(texts)
        torch.manual_seed(self.seed)
        model = SmolLM3ForCausalLM(_config(work.recipe, tokenizer, len(tokenizer)))
        model.save_pretrained(work.folder)
        tokenizer.save_pretrained(work.folder)
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{parameters:,} parameters, {len(tokenizer):,} tokens in the vocabulary, from {len(texts):,} texts",
            flush=True,
        )
        return {"parameters": parameters, "vocab_size": len(tokenizer), "texts": len(texts)}

    def sketch(self, recipe, out):
        tokenizer = self._tokenizer([])
        tokenizer.save_pretrained(out)
        size = self.vocab_size if self.tokenizer == "bpe" else len(tokenizer)
        _config(recipe, tokenizer, size).save_pretrained(out)

    def _tokenizer(self, texts: list[str]):
        from smolpost.chat.tokenizer import build_tokenizer

        return build_tokenizer(texts, kind=self.tokenizer, vocab_size=self.vocab_size, template=self.template)


def _config(recipe: Recipe, tokenizer, vocab_size: int):
    from smolpost.model import SmolLM3Config

    return SmolLM3Config(
        **dataclasses.asdict(recipe.model.architecture),
        vocab_size=vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|begin_of_text|>"),
        eos_token_id=tokenizer.eos_token_id,
    )


def _texts(work: Work, tokenizer) -> list[str]:
    """The rendered text of every row that can be read; refused rows are counted in a line."""
    from smolpost.data.mixtures import mix, rows_alone

    texts, refused = [], []
    for mixture in work.data.values():
        for _, row in mix(rows_alone(mixture), refused):
            texts.extend(_rendered(row, tokenizer))
    if refused:
        print(f"{len(refused):,} rows are refused and left out of the vocabulary; the first: {refused[0]}", flush=True)
    return texts


def _rendered(row: dict, tokenizer) -> list[str]:
    from smolpost.chat.render import render
    from smolpost.data.prompts import named

    conversations = [row[key] for key in ("messages", "chosen", "rejected") if key in row]
    if not conversations:
        return [row["text"]]
    options = {"template_kwargs": row.get("chat_template_kwargs"), "tools": row.get("tools"), "today": RELEASE_DAY}
    with named(row):
        return [render(tokenizer, messages, **options) for messages in conversations]
