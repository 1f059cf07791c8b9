"""How the next token is drawn from a model's logits, and random numbers that belong to one row alone.

Shapes: B rows, L tokens so far, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import LogitsProcessor

# SplitMix64 (Steele, Lea, Flood 2014), as torch's signed 64-bit integers wrap around.
GOLDEN, FIRST, SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class NotFinite(RuntimeError):
    """A logit is NaN, so no token can be chosen."""

    def __init__(self):
        super().__init__("a probability is NaN: the model's activations are not finite")


class Sampling(NamedTuple):
    """The distribution of the next token. The settings apply in the order of the attributes.

    Attributes:
        repetition_penalty: Divides positive logits, and multiplies negative ones, of tokens that occur in the prompt or
            the reply; > 0 (arXiv:1909.05858).
        presence_penalty: Subtracted from the logits of tokens that occur in the reply.
        temperature: Divisor of the logits; 0 takes the likeliest token, and what follows has no effect.
        top_k: Number of likeliest tokens that stay.
        top_p: The likeliest tokens that together have at least this probability stay; in (0, 1] (arXiv:1904.09751).
        min_p: Tokens with less than this share of the likeliest token's probability go; in [0, 1) (arXiv:2407.01082).
    """

    temperature: float
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far have a say."""
        return self.repetition_penalty not in (None, 1) or bool(self.presence_penalty)


def truncated(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scores [B, V] at temperature 1, with -inf at tokens that top_k, top_p or min_p remove; the likeliest stays."""
    if sampling.top_k is not None:
        least = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        scores = _without_tail(scores, sampling.top_p)
    if sampling.min_p:
        least = scores.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores


def exponentials(seeds: torch.Tensor, step: int, num_tokens: int) -> torch.Tensor:
    """Exponential random numbers [B, V] of mean 1; each follows from its row's seed, the step and its token alone.

    Args:
        seeds: [B] int64.
        step: Number of tokens in the reply so far.
        num_tokens: V.
    """
    state = _mixed(_mixed(seeds) + step)[:, None]
    bits = _mixed(state + GOLDEN * torch.arange(1, num_tokens + 1, device=seeds.device))
    # 53 bits. The smallest numbers decide which token wins, and near 0 a float is exact enough for all of them.
    uniform = (_shifted(bits, 11).float() + 0.5) * 2.0**-53
    return -torch.log1p(-uniform.clamp_(max=1 - 2.0**-24))


class RowSampling(LogitsProcessor):
    """Chooses the next token of each row with random numbers of its own, for `generate` without sampling.

    The scores that it returns have their maximum at the chosen token: log-probabilities plus Gumbel noise, so that
    the likeliest is an exact sample (the Gumbel-max trick; arXiv:1611.01144, eq. 1).

    Args:
        seeds: [B] int64.
        prompts: [B, L] bool: which of the first L tokens are a prompt's own, and not padding.
        check: Called before each token; what it raises ends the generation.
    """

    def __init__(self, sampling: Sampling, seeds: torch.Tensor, prompts: torch.Tensor, check: Callable[[], object]):
        self.sampling, self.seeds, self.prompts, self.check = sampling, seeds, prompts, check

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_ids: [B, L], padded on the left.
            scores: [B, V] logits.
        Raises:
            NotFinite: A logit is NaN.
        """
        self.check()
        if scores.isnan().any():
            raise NotFinite()
        if self.sampling.has_penalties:
            scores = self._penalised(input_ids, scores)
        if self.sampling.temperature == 0:
            return scores
        scores = truncated(scores / self.sampling.temperature, self.sampling)
        step = input_ids.shape[1] - self.prompts.shape[1]
        return scores - exponentials(self.seeds, step, scores.shape[-1]).log()

    def _penalised(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        length = self.prompts.shape[1]
        in_reply = _occurs(input_ids[:, length:], torch.ones_like(input_ids[:, length:], dtype=torch.bool), scores)
        if self.sampling.repetition_penalty:
            penalty = self.sampling.repetition_penalty
            seen = in_reply | _occurs(input_ids[:, :length], self.prompts, scores)
            scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        return scores - (self.sampling.presence_penalty or 0.0) * in_reply


def _without_tail(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Scores [B, V] with -inf at the unlikeliest tokens, which share at most 1 - top_p."""
    ascending, order = scores.sort(dim=-1)
    is_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    is_tail[:, -1].zero_()
    return scores.masked_fill(torch.empty_like(is_tail).scatter_(-1, order, is_tail), -torch.inf)


def _occurs(ids: torch.Tensor, counted: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """[B, V] bool: which tokens are among the counted ids [B, L] of each row."""
    return torch.zeros_like(scores).scatter_add_(1, ids, counted.to(scores.dtype)) > 0


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer on int64."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Right by some bits, with zeros on the left: torch shifts the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
