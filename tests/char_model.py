"""A character tokenizer, and transformers' own SmolLM3 over it, tiny and random."""

import torch
from transformers import PreTrainedTokenizerBase
from transformers.models.smollm3 import SmolLM3Config, SmolLM3ForCausalLM

from smolpost.chat.tokenizer import build_tokenizer


def char_tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(["abc"], kind="char", vocab_size=256, template="smollm3")


def char_model(tokenizer: PreTrainedTokenizerBase) -> SmolLM3ForCausalLM:
    """The same weights at every call."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    config = SmolLM3Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes, **ids)
    model = SmolLM3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
