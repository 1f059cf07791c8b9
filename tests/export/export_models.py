"""Small random checkpoints whose logits depend on every position, and a recall task without a training behind it."""

import json
from pathlib import Path

import numpy as np
import torch

from smolpost.chat.masks import encode_prompt
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data.tasks import recall_row
from smolpost.evaluation.task import Item, Sample
from smolpost.export.check import LengthCheck
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.schema import RELEASE_DAY

THETA = 50_000.0
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024, "rope_theta": THETA}


def save_checkpoint(folder: Path, *, kind="char", dtype=torch.float32, sampling=True, **fields) -> Path:
    """A random model of four layers as `save_pretrained` of stock transformers 5 leaves it: no top-level rope_theta.

    Args:
        kind: Of the tokenizer.
        fields: Of the configuration.
    """
    tokenizer = build_tokenizer(["abc"], kind=kind, vocab_size=280, template="smollm3")
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    model = SmolLM3ForCausalLM(SmolLM3Config(**settings | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.25)
    if sampling:
        model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def letters(*lengths):
    """What is asked of a model here: the task below, at these lengths."""
    tokenizer = build_tokenizer(["abc"], kind="char", vocab_size=280, template="smollm3")
    return {length: LengthCheck(Letters(length), Letters(length).items(tokenizer)) for length in lengths}


class Letters:
    """The share of a recall row's reference letters that a reply holds in their places; random models differ in it."""

    def __init__(self, length: int, num_prompts: int = 2):
        self.length, self.num_prompts = length, num_prompts

    def items(self, tokenizer):
        items = []
        for i in range(self.num_prompts):
            row = recall_row(np.random.default_rng(i), length=self.length - 20, pairs=4, queries=4)
            *messages, answer = row["messages"]
            ids = encode_prompt(tokenizer, messages, template_kwargs=row["chat_template_kwargs"], today=RELEASE_DAY)
            items.append(Item(str(i), ids, max_new_tokens=8, about=answer["content"]))
        return items

    def measure(self, engine, items):
        replies = engine.generate([item.ids for item in items], max_new_tokens=8)
        pairs = [(item, reply.text) for item, [reply] in zip(items, replies, strict=True)]
        return [
            Sample(item.id, {"found": sum(a == b for a, b in zip(item.about, text, strict=False)) / 8})
            for item, text in pairs
        ]
