"""A causal LM that scores tokens where it is told to, in place of making logits everywhere."""

import functools
import types
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from smolpost.objectives.head import decoder_of, head_of
from smolpost.objectives.logprobs import TokenScores, token_scores


@dataclass(frozen=True)
class Scored:
    """Which tokens to score.

    DDP and FSDP move all tensors of a tuple to the device, but leave a dataclass as it is.

    Attributes:
        positions: [S] where in the row each of them is predicted from.
        targets: [S] their ids; on the CPU, or a GPU has to be waited for.
        weights: [S] coefficient of each log-probability in the loss, where it is known beforehand.
        metrics: Whether entropy and accuracy are wanted, too.
    """

    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None = None
    metrics: bool = True


def score_tokens(model: PreTrainedModel) -> None:
    """Teach `model.forward` the keyword `scored`; without it the forward is as before.

    The forward itself is replaced, not called around, as DDP, ZeRO and FSDP work on what happens inside it. Given one
    row and `scored`, the model returns the TokenScores of the targets.

    Args:
        model: A causal LM of transformers, without the wrappers of peft, DDP and the like.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # the trainer and generate() read the signature
    def forward(self, *args, scored: Scored | None = None, **kwargs) -> TokenScores:
        if scored is None:
            return original(*args, **kwargs)
        # Decoder and head are looked up at every call: FSDP and peft replace them.
        hidden = decoder_of(self)(*args, use_cache=False, **kwargs).last_hidden_state
        states = hidden[0].index_select(0, scored.positions)
        return token_scores(states, scored.targets, head_of(self), weights=scored.weights, metrics=scored.metrics)

    model.forward = types.MethodType(forward, model)
