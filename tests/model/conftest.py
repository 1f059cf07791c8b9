"""Pairs of equal models, transformers' SmolLM3 and ours, small enough for one core."""

import pytest
import torch
from transformers.models.smollm3 import modeling_smollm3 as stock_models
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config as StockConfig

import smolpost.model as our_models

TINY = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


@pytest.fixture
def tiny():
    """Return the fields of a 4-layer model, as a dict to override."""
    return dict(TINY)


@pytest.fixture
def make_pair():
    """Return a factory of (stock, ours): one class name, one set of fields, the same random weights, eval mode."""

    def make(attention="sdpa", name="SmolLM3ForCausalLM", **fields):
        torch.manual_seed(0)
        fields = {**TINY, **fields}
        stock = getattr(stock_models, name)._from_config(StockConfig(**fields), attn_implementation=attention)
        ours = getattr(our_models, name)._from_config(our_models.SmolLM3Config(**fields), attn_implementation=attention)
        with torch.no_grad():
            for parameter in stock.parameters():
                # Unlike the initial ones, these weights give biases, norms and NoPE layers a visible part.
                parameter.add_(torch.randn_like(parameter) * 0.2)
        ours.load_state_dict(stock.state_dict())
        return stock.eval(), ours.eval()

    return make


@pytest.fixture
def tokens():
    """Return 2 rows of 12 tokens without special ones, [2, 12]."""
    return torch.randint(3, TINY["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))
