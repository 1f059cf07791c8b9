"""Small checkpoints of other families with random weights: their own config, control tokens and chat template."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=1024,
)  # fmt: skip
PRINTABLE = [chr(i) for i in range(32, 127)]


class ModelFamily(NamedTuple):
    """
    Attributes:
        config: Ids of the special tokens -> config.
        tokens: Builds the vocabulary without added tokens.
        special, added: Control tokens, special and ordinary.
        bos, eos, pad: As the family's base model names them.
        turn_end: The control token that ends a reply under the family's own template.
        template: Text of its own chat template, or None where this installation does not have it.
    """

    config: Callable[..., transformers.PreTrainedConfig]
    tokens: Callable[[], Tokenizer]
    special: tuple[str, ...]
    added: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    turn_end: str
    template: str | None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Without a chat template."""
        backend = self.tokens()
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in self.special])
        backend.add_tokens([AddedToken(token, normalized=False) for token in self.added])
        if self.bos:  # as these families do it when they are asked to add special tokens
            pair = (self.bos, backend.token_to_id(self.bos))
            backend.post_processor = processors.TemplateProcessing(f"{self.bos} $A", special_tokens=[pair])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=self.bos, eos_token=self.eos, pad_token=self.pad,
            clean_up_tokenization_spaces=False,
        )  # fmt: skip

    def write(self, folder: Path, template: str | None = None, seed: int = 0, **settings) -> Path:
        """A checkpoint folder as a Hub repository has it; `settings` are of its config."""
        tokenizer = self.tokenizer()
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(self.config(vocab_size=len(tokenizer), **ids, **settings))
        with torch.no_grad():
            for parameter in model.parameters():  # large enough for attention and norms to matter
                parameter.add_(torch.randn_like(parameter) * 0.1)
        tokenizer.chat_template = template
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


def _bytes() -> Tokenizer:
    """A token per byte, as in Qwen's and Llama 3's vocabularies without their merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|[^\s\p{N}]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    return backend


def _pieces() -> Tokenizer:
    """Characters, and bytes for those it lacks, as SentencePiece's vocabularies without their merges."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "\n", *PRINTABLE[1:]]
    vocabulary = {word: i for i, word in enumerate(words)}
    return Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))


def _gemma() -> Tokenizer:
    backend = _pieces()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _mistral() -> Tokenizer:
    """A text that does not begin with a blank gets one, as in Llama 2's and Mistral's vocabularies."""
    backend = _pieces()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _of_trl(name: str) -> str | None:
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


# In the manner of Mistral's: the system message is part of the first question, roles alternate, the end of text ends a
# reply.
MISTRAL = """{{- bos_token -}}
{%- set opening = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' -%}
{%- for message in messages if message.role != 'system' -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must alternate user/assistant/user/assistant') -}}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    {{- '[INST] ' ~ (opening if loop.first else '') ~ message.content ~ '[/INST]' -}}
  {%- else -%}
    {{- ' ' ~ message.content.strip() ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}"""

MODEL_FAMILIES = {
    "qwen3": ModelFamily(
        lambda **ids: transformers.Qwen3Config(**SIZES, **{"tie_word_embeddings": True} | ids),
        _bytes, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
        None, "<|endoftext|>", "<|endoftext|>", "<|im_end|>", _of_trl("qwen3"),
    ),
    "llama3": ModelFamily(
        lambda **ids: transformers.LlamaConfig(**SIZES, **ids),
        _bytes,
        (
            "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
            "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
        ),
        (), "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>", _of_trl("llama3_2"),
    ),
    "gemma3": ModelFamily(
        lambda **ids: transformers.Gemma3TextConfig(
            **SIZES, **ids, sliding_window=16, query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "full_attention"],
        ),
        _gemma, ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        (), "<bos>", "<eos>", "<pad>", "<end_of_turn>", _of_trl("gemma3"),
    ),
    "mistral": ModelFamily(
        lambda **ids: transformers.MistralConfig(**SIZES, **ids, sliding_window=16),
        _mistral, ("<s>", "</s>", "[INST]", "[/INST]"),
        (), "<s>", "</s>", "</s>", "</s>", MISTRAL,
    ),
}  # fmt: skip
