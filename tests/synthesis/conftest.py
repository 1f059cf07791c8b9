"""Fixtures on `tiny_checkpoints`, and checkpoints rigged to reply as a function says."""

import pytest
import torch
from tiny_checkpoints import make_models, make_tokenizer
from transformers import GenerationConfig


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def models(tokenizer):
    """Return the chosen and the rejected model."""
    return make_models(tokenizer)


class Rigged(torch.nn.Module):
    """Replies to a prompt's text with what `reply` returns for it, then stops. `prompts` keeps what was asked."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, reply):
        super().__init__()
        self.tokenizer, self.reply, self.prompts = tokenizer, reply, []
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
    """Return a factory of rigged (model, tokenizer): reply function -> checkpoint."""
    return lambda reply: (Rigged(tokenizer, reply), tokenizer)
