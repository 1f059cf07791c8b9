"""A character tokenizer, two tiny random models of transformers' own SmolLM3 and arithmetic rows, for any process."""

import torch
from transformers.models.smollm3 import SmolLM3Config, SmolLM3ForCausalLM

from smolpost.chat.tokenizer import build_tokenizer


def make_tokenizer():
    return build_tokenizer(["abc"], kind="char", vocab_size=256, template="smollm3")


def make_models(tokenizer):
    """The chosen and the rejected model."""
    return [make_model(seed, tokenizer) for seed in (0, 1)]


def make_model(seed, tokenizer):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    model = SmolLM3ForCausalLM(SmolLM3Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        # Likes the stop token, so that not every reply is cut.
        model.lm_head.weight[tokenizer.eos_token_id] *= 2.5
    return model


def make_rows(num_rows):
    """Sums `i+i?`, every other row in think mode."""
    rows = []
    for i in range(num_rows):
        reference = f"<think>\ntwice {i}\n</think>\n{2 * i}" if i % 2 else str(2 * i)
        messages = [{"role": "user", "content": f"{i}+{i}?"}, {"role": "assistant", "content": reference}]
        kwargs = {"enable_thinking": bool(i % 2), "custom_instructions": "", "python_tools": [], "xml_tools": []}
        rows.append({"messages": messages, "chat_template_kwargs": kwargs, "source": "sums"})
    return rows
