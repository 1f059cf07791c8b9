"""The sampling settings of a chat, and how a user writes them."""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from smolpost.errors import UserError

LONGEST = 8192  # tokens of a reply, where the user names no limit
NUM_SEEDS = 10**6  # that a chat draws from: short enough to be typed again


@dataclass(frozen=True)
class Settings:
    """How replies are sampled; defaults are the SmolLM3 card's.

    Attributes:
        temperature: >= 0; 0 takes the likeliest token each time.
        top_p: In (0, 1].
        top_k: >= 1; None: all tokens.
        max_new_tokens: Longest reply, thinking included; None: `LONGEST`, or less where the model's context is short.
        seed: Of every reply; None draws one for each.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int | None = None
    max_new_tokens: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: A value is out of its range.
        """
        limits = {
            "temperature": (0 <= self.temperature < math.inf, "a number from 0", "0.6"),
            "top_p": (0 < self.top_p <= 1, "a number above 0 and up to 1", "0.95"),
            "top_k": (self.top_k is None or self.top_k >= 1, "a whole number from 1, or none", "20"),
            "max_new_tokens": (
                self.max_new_tokens is None or self.max_new_tokens >= 1, "a whole number from 1, or none", "2048"
            ),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0, or none", "0"),
        }  # fmt: skip
        for name, (valid, expected, example) in limits.items():
            if not valid:
                raise UserError(f"{name}={getattr(self, name)} is not {expected}; try {name}={example}")

    def __str__(self) -> str:
        """As /set takes them."""
        return " ".join(f"{name}={_shown(getattr(self, name))}" for name in NAMES)

    def longest(self, room: int | None) -> int:
        """Tokens that a reply may have.

        Args:
            room: Tokens that the model's context leaves for it; None: not known.
        """
        most = self.max_new_tokens or LONGEST
        return most if room is None else min(most, room)

    def seed_of(self, attempt: int) -> int:
        """The seed of a reply.

        Args:
            attempt: Number of earlier replies to the same prompt: with a fixed seed, each one takes the next seed.
        """
        return random.randrange(NUM_SEEDS) if self.seed is None else (self.seed + attempt) % 2**63


NAMES = tuple(field.name for field in fields(Settings))


def changed(settings: Settings, words: Iterable[str]) -> Settings:
    """The settings with those that name=value words give.

    Raises:
        UserError: A word is not a setting, or its value is not one that it takes.
    """
    given: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in NAMES:
            raise UserError(f"{word} is not a setting; write NAME=VALUE with one of: {', '.join(NAMES)}")
        given[name] = _value(name, text)
    return replace(settings, **given)


def of_generation_config(config: dict[str, Any]) -> tuple[Settings, list[str]]:
    """The sampling that a checkpoint's generation_config.json asks for, and its further settings, which have no effect.

    A model whose settings do not sample gets the defaults of `Settings`.
    """
    if not config.get("do_sample"):
        return Settings(), []
    # What it leaves open is off, as servers have it.
    own = {"temperature": config.get("temperature") or 1.0, "top_p": config.get("top_p") or 1.0}
    plain = {"min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    others = [f"{name}={config[name]}" for name, off in plain.items() if config.get(name) not in (None, off)]
    return Settings(**own, top_k=config.get("top_k") or None), others


def _value(name: str, text: str) -> float | int | None:
    if text.lower() in ("none", "null") and name not in ("temperature", "top_p"):
        return None
    try:
        return float(text) if name in ("temperature", "top_p") else int(text)
    except ValueError:
        kind = "a number" if name in ("temperature", "top_p") else "a whole number or none"
        raise UserError(f"{name}={text} is not {kind}") from None


def _shown(value: float | int | None) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
