"""Heads to score tokens with: drawn ones, with the plain way to do it, and those of small models."""

import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.objectives.head import Head

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def problem(num_tokens, num_words, width, *, bias=False, softcap=None, scale=1.0, dtype=None, seed=0, size=1.0):
    """Hidden states, targets, coefficients and a head, all that can train requiring a gradient."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    hidden = (draw(num_tokens, width) * size).requires_grad_()
    weight = (draw(num_words, width) / width**0.5).requires_grad_()
    bias = draw(num_words).requires_grad_() if bias else None
    targets = torch.randint(num_words, (num_tokens,), generator=generator)
    return hidden, targets, draw(num_tokens), Head(weight, bias, softcap, scale)


def full_logits(hidden, head):
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


def plain(hidden, targets, head):
    """Log-probabilities, entropy and accuracy the plain way."""
    logits = full_logits(hidden, head)
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, targets[:, None])[:, 0], entropy.detach(), logits.argmax(-1) == targets


def gradients(loss, hidden, head):
    """Gradients of whatever trains; an empty batch gives zeros, never None."""
    return torch.autograd.grad(loss, [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad])


SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
MODELS = {
    "ours": (SmolLM3ForCausalLM, SmolLM3Config, {"tie_word_embeddings": True}),
    "ours untied": (SmolLM3ForCausalLM, SmolLM3Config, {"tie_word_embeddings": False}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "softcap": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 0.5, "head_dim": 8}),
    "no softcap": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": None, "head_dim": 8}),
    "divided": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 0.125}),
    "multiplied": (CohereForCausalLM, CohereConfig, {"logit_scale": 7.0}),
    "multiplied in the body's name": (FalconH1ForCausalLM, FalconH1Config, {"lm_head_multiplier": 5.0, **MAMBA}),
    "bias": (PhiForCausalLM, PhiConfig, {}),
}


def build(name):
    torch.manual_seed(0)
    model, config, fields = MODELS[name]
    model = model(config(**SMALL | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model
