"""A model that answers as a test tells it to."""

import torch
from transformers import GenerationConfig

from smolpost.model import SmolLM3Config


class Rigged(torch.nn.Module):
    """Replies to a prompt's text with what `reply` returns for it, then stops. `prompts` keeps what was asked."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, reply):
        super().__init__()
        self.tokenizer, self.reply, self.prompts = tokenizer, reply, []
        self.config = SmolLM3Config(vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=None)
        self.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
        self.name_or_path = "rigged"

    def generate(self, input_ids, *, attention_mask, generation_config, logits_processor=None, streamer=None):
        replies = []
        for row, mask in zip(input_ids, attention_mask.bool(), strict=True):
            self.prompts.append(self.tokenizer.decode(row[mask]))
            text = self.reply(self.prompts[-1]) + "<|im_end|>"
            replies.append(self.tokenizer.encode(text)[: generation_config.max_new_tokens])
        if streamer is not None:  # there is one prompt then
            streamer.put(input_ids)
            for token in replies[0]:
                streamer.put(torch.tensor([token]))
        longest = max(map(len, replies))
        padded = [reply + [generation_config.pad_token_id] * (longest - len(reply)) for reply in replies]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)
