"""Tiny models of some architectures, with random weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.smollm3 import SmolLM3Config as StockConfig
from transformers.models.smollm3 import SmolLM3ForCausalLM as StockSmolLM3

from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM

EOS, PAD, VOCAB = 2, 0, 64
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
)  # fmt: skip
MODELS = {
    "ours packed": (SmolLM3ForCausalLM, SmolLM3Config, "packed"),
    "ours sdpa": (SmolLM3ForCausalLM, SmolLM3Config, "sdpa"),
    "SmolLM3": (StockSmolLM3, StockConfig, "sdpa"),
    "Llama": (LlamaForCausalLM, LlamaConfig, "sdpa"),
    "Qwen3": (Qwen3ForCausalLM, Qwen3Config, "packed"),
}


def random_model(family, config, attention, **changes):
    """With weights large enough that its replies differ and some of them stop."""
    torch.manual_seed(0)
    config = config(**{**SIZES, **changes})
    config._attn_implementation = attention
    model = family(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()
