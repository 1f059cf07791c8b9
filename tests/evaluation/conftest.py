"""A character tokenizer, transformers' own SmolLM3 tiny and random, and models rigged to reply as a function says."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.models.smollm3 import SmolLM3Config, SmolLM3ForCausalLM

from smolpost.chat.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(["abc"], kind="char", vocab_size=256, template="smollm3")


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    ids = dict(pad_token_id=None, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    config = SmolLM3Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes, **ids)
    model = SmolLM3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


class Rigged(torch.nn.Module):
    """Replies to a prompt's text with what `reply` returns for it, then stops. `prompts` keeps what was asked."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, reply):
        super().__init__()
        self.tokenizer, self.reply, self.prompts = tokenizer, reply, []
        self.config = SmolLM3Config(vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=None)
        self.generation_config = GenerationConfig()

    def generate(self, input_ids, *, attention_mask, generation_config):
        replies = []
        for row, mask in zip(input_ids, attention_mask.bool(), strict=True):
            self.prompts.append(self.tokenizer.decode(row[mask]))
            text = self.reply(self.prompts[-1]) + "<|im_end|>"
            replies.append(self.tokenizer.encode(text)[: generation_config.max_new_tokens])
        longest = max(map(len, replies))
        padded = [reply + [generation_config.pad_token_id] * (longest - len(reply)) for reply in replies]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


@pytest.fixture
def rig(tokenizer):
    """Return a factory of rigged models: reply function -> model."""
    return lambda reply: Rigged(tokenizer, reply)
