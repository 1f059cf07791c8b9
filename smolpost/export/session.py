"""A model in a runtime, reduced to what a comparison needs; and greedy replies on top of it.

Shapes: L tokens, V vocabulary.
"""

from collections.abc import Collection
from typing import Protocol

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from smolpost.errors import UserError
from smolpost.inference.engine import Reply
from smolpost.inference.generation import inference, reply_text

# Tokens per call: the logits [L, V] of a long prompt take gigabytes.
CHUNK = 256


class Session(Protocol):
    """One sequence in a model that remembers what it was fed.

    Attributes:
        stop_tokens: Ids at which the runtime, or what is built on it, ends a reply, as it reads the exported folder;
            None if the folder does not say.
    """

    stop_tokens: set[int] | None

    def reset(self) -> None:
        """Forget the sequence."""

    def feed(self, ids: list[int]) -> np.ndarray:
        """Append 1 to CHUNK tokens and return the logits after each of them, [L, V] fp32."""


class TorchSession:
    """A causal LM of transformers."""

    def __init__(self, model: PreTrainedModel, stop_tokens: set[int] | None = None):
        self.model, self.stop_tokens = model, stop_tokens
        self.reset()

    def reset(self) -> None:
        self._cache = DynamicCache(config=self.model.config)

    def feed(self, ids: list[int]) -> np.ndarray:
        with inference(self.model):
            rows = torch.tensor([ids], device=self.model.device)
            logits = self.model(input_ids=rows, past_key_values=self._cache, use_cache=True).logits
        return logits[0].float().cpu().numpy()


class GreedyEngine:
    """An `evaluation.engine.Engine` for greedy replies of any session, one prompt at a time.

    Args:
        stop_tokens: Ids that end a reply.
    """

    def __init__(self, session: Session, tokenizer: PreTrainedTokenizerBase, stop_tokens: Collection[int]):
        self.session, self.tokenizer, self._stop_tokens = session, tokenizer, stop_tokens

    def generate(self, prompts, *, max_new_tokens, temperature=0.0, top_p=1.0, num_samples=1, seed=0):
        """
        Raises:
            UserError: Something else than greedy decoding is asked for.
        """
        if temperature > 0:
            raise UserError(f"temperature={temperature}: exports are scored greedily; use 0")
        return [[self._reply(prompt, max_new_tokens)] * num_samples for prompt in prompts]

    def _reply(self, prompt: list[int], max_new_tokens: int) -> Reply:
        self.session.reset()
        for start in range(0, len(prompt), CHUNK):
            logits = self.session.feed(prompt[start : start + CHUNK])
        reply = [int(logits[-1].argmax())]
        while reply[-1] not in self._stop_tokens and len(reply) < max_new_tokens:
            reply.append(int(self.session.feed(reply[-1:])[-1].argmax()))
        return Reply(
            reply_text(self.tokenizer, reply, self._stop_tokens), len(reply), reply[-1] not in self._stop_tokens
        )
