"""A tokenized row, and the policy by which its tokens train."""

import numpy as np

from smolpost.chat.masks import Policy
from smolpost.data.settings import Rows


class Tokenized:
    """A row: its parts' ids and fates, or why it is refused."""

    __slots__ = ("fates", "fault", "ids", "is_text", "neutralised", "notes", "thinks")

    def __init__(
        self,
        ids: list[np.ndarray],
        fates: list[np.ndarray],
        neutralised: int = 0,
        thinks: bool = False,
        is_text: bool = False,
        fault: str | None = None,
        notes: tuple[str, ...] = (),
    ):
        self.ids = ids
        self.fates = fates
        self.neutralised = neutralised
        self.thinks = thinks
        self.is_text = is_text
        self.fault = fault
        self.notes = notes


def refused(fault: str, num_parts: int) -> Tokenized:
    """A refused row: no tokens, and the reason."""
    return Tokenized([np.zeros(0, np.int32)] * num_parts, [np.zeros(0, np.int8)] * num_parts, fault=fault)


def policy_of(stage: Rows) -> Policy:
    """The mask policy of a training stage."""
    return Policy(roles=tuple(stage.train_roles), reasoning=stage.train_reasoning, last_turn_only=stage.last_turn_only)
