"""A preference loss as a user writes one, outside the library."""

from dataclasses import dataclass

from smolpost.objectives.losses import Loss
from smolpost.schema import number


@dataclass
class Hinge(Loss):
    """max(0, margin - beta (r_chosen - r_rejected)); with margin 1 it is TRL's hinge loss (arXiv:2309.06657)."""

    margin: float = number("(0, inf)", 1.0)

    def values(self, chosen, rejected, beta, lengths):
        return (self.margin - beta * (chosen - rejected)).relu()

    def at_reference(self, beta):
        return self.margin
