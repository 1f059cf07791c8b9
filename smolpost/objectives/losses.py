"""Preference losses: each a class with the loss's own settings, registered under the name that recipes use.

A pair has two log-ratios. A side's log-ratio is its log-probability under the policy minus that under the reference,
both summed over the side's scored tokens, nats. Shapes: `B` pairs. Names, values and gradients are those of TRL's
DPOTrainer. Recipes are checked against this file, so it does not import torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from smolpost.errors import UserError
from smolpost.registry import LOSSES, check_defined
from smolpost.schema import number

if TYPE_CHECKING:
    from torch import Tensor


class SideLengths(NamedTuple):
    """[B] int64 scored tokens of each chosen and of each rejected side."""

    chosen: "Tensor"
    rejected: "Tensor"


@dataclass
class Loss:
    """A preference loss. One with settings is a dataclass: the settings are its fields, stated as in `schema`.

    VERSION is raised when the same log-ratios give another loss: stages with the loss are trained again then.

    All losses have `beta`, the scale on the log-ratios, per nat and above 0, so it is a field of the stage.
    """

    VERSION: ClassVar[int] = 1

    def values(self, chosen: "Tensor", rejected: "Tensor", beta: float, lengths: SideLengths) -> "Tensor":
        """The loss of each pair.

        Args:
            chosen, rejected: [B] log-ratios, nats.
        Returns:
            [B], differentiable. Nothing may wait for the device.
        """
        raise NotImplementedError

    def at_reference(self, beta: float) -> float:
        """The loss of a pair where the policy is the reference, so that both log-ratios are 0."""
        raise NotImplementedError

    def __call__(self, chosen: "Tensor", rejected: "Tensor", beta: float, lengths: SideLengths) -> "Tensor":
        """`values`, with their shape checked.

        Raises:
            UserError: There is not one value per pair.
        """
        values = self.values(chosen, rejected, beta, lengths)
        if values.shape != chosen.shape:
            raise UserError(
                f"{type(self).__module__}.{type(self).__qualname__}.values gives shape {tuple(values.shape)} for "
                f"{len(chosen)} pairs; return one value per pair"
            )
        return values


def loss(name: str) -> Callable[[type[Loss]], type[Loss]]:
    """A decorator that registers a loss under the name that recipes use: `stages.NAME.loss=name`.

    Raises (the decorator):
        UserError: The class lacks a method.
    """

    def register(kind: type[Loss]) -> type[Loss]:
        check_defined(kind, Loss, "values", "at_reference")
        return LOSSES.add(name, kind)

    return register


def configured(name: str, settings: dict[str, Any]) -> Loss:
    """The loss of that name.

    Args:
        settings: A recipe's `loss_settings`, checked.
    """
    return LOSSES[name](**settings)


@loss("apo_zero")
class ApoZero(Loss):
    """Raise chosen and lower rejected likelihood, each against the reference.

    Eq. 7 of arXiv:2408.06266: 1 - sigmoid(beta r_chosen) + sigmoid(beta r_rejected), in (0, 2).
    """

    def values(self, chosen, rejected, beta, lengths):
        return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()

    def at_reference(self, beta):
        return 1 - 0.5 + 0.5


@loss("apo_down")
class ApoDown(Loss):
    """Lower both likelihoods, rejected more: for chosen sides that are worse than what the policy writes itself.

    Eq. 8 of arXiv:2408.06266: sigmoid(beta r_chosen) + 1 - sigmoid(beta (r_chosen - r_rejected)), in (0, 2).
    """

    def values(self, chosen, rejected, beta, lengths):
        return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()

    def at_reference(self, beta):
        return 0.5 + 1 - 0.5


@loss("sigmoid")
class Sigmoid(Loss):
    """Raise chosen likelihood against rejected: DPO.

    Eq. 7 of arXiv:2305.18290: -log sigmoid(beta (r_chosen - r_rejected)), above 0.
    """

    def values(self, chosen, rejected, beta, lengths):
        return _dpo(beta * (chosen - rejected))

    def at_reference(self, beta):
        return math.log(2)


@loss("ipo")
class Ipo(Loss):
    """Bring the margin of the two mean log-ratios per token to 1 / (2 beta), and no further.

    Eq. 17 of arXiv:2310.12036 with tau = beta, on log-ratios per token instead of per side, as in TRL; 0 or above. The
    smaller beta, the wider the margin.
    """

    def values(self, chosen, rejected, beta, lengths):
        margin = chosen / lengths.chosen.clamp(min=1) - rejected / lengths.rejected.clamp(min=1)
        return (margin - 1 / (2 * beta)) ** 2

    def at_reference(self, beta):
        return 1 / (2 * beta) ** 2


@loss("robust")
@dataclass
class Robust(Loss):
    """DPO's loss on the true preferences, estimated without bias from pairs of which some are swapped.

    Section 3.1 of arXiv:2403.00409: ((1 - e) DPO(pair) - e DPO(swapped pair)) / (1 - 2 e), e the share of swapped
    pairs. With e > 0 it has no lower bound: it falls by e / (1 - 2 e) per unit of a large margin.
    """

    label_smoothing: float = number("[0, 0.5)", 0.0)  # e; 0 is the loss sigmoid

    def values(self, chosen, rejected, beta, lengths):
        e = self.label_smoothing
        as_labelled, swapped = _dpo(beta * (chosen - rejected)), _dpo(beta * (rejected - chosen))
        return ((1 - e) * as_labelled - e * swapped) / (1 - 2 * e)

    def at_reference(self, beta):
        return math.log(2)  # ((1 - e) ln 2 - e ln 2) / (1 - 2 e)


def _dpo(scaled_margin: "Tensor") -> "Tensor":
    from torch.nn.functional import logsigmoid

    return -logsigmoid(scaled_margin)
