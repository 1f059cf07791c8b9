"""Rewards of sampled replies: each a class with its own settings, registered under the name that recipes use.

Recipes are checked against this file, so it does not import torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from smolpost.chat.answers import Answers, MathAnswers, PatternAnswers, parts_of
from smolpost.registry import REWARDS, check_defined
from smolpost.schema import choice, count


class Rollout(NamedTuple):
    """A sampled reply, beside the reply that the row itself has.

    Attributes:
        reply, reference: Texts without the stop token; think tags stay.
        opened: The prompt ended inside a think block.
        num_tokens: Of the sampled reply, its stop token included.
        max_tokens: It could have had.
        stopped: It ended with a stop token.
    """

    reply: str
    reference: str
    opened: bool
    num_tokens: int
    max_tokens: int
    stopped: bool


@dataclass
class Reward:
    """A reward. One with settings is a dataclass: the settings are its fields, stated as in `schema`.

    VERSION is raised when the same reply gets another reward: stages with the reward are trained again then.
    """

    VERSION: ClassVar[int] = 1

    def value(self, rollout: Rollout) -> float | None:
        """The reply's reward; None where the row does not say what would be right."""
        raise NotImplementedError


def reward(name: str) -> Callable[[type[Reward]], type[Reward]]:
    """A decorator that registers a reward under the name that recipes use: `stages.NAME.rewards.name=1.0`.

    Raises (the decorator):
        UserError: The class lacks the method.
    """

    def register(kind: type[Reward]) -> type[Reward]:
        check_defined(kind, Reward, "value")
        return REWARDS.add(name, kind)

    return register


def configured(name: str, settings: dict[str, Any]) -> Reward:
    """The reward of that name.

    Args:
        settings: A recipe's `reward_settings.NAME`, checked.
    Raises:
        UserError: A setting cannot be used, or a package is missing.
    """
    return REWARDS[name](**settings)


@reward("right_answer")
@dataclass
class RightAnswer(Reward):
    """1 where the reply's answer is that of the row's own reply, else 0; thinking is left out on both sides."""

    answer: str = choice("pattern", "math")  # equal as text, or as mathematics (math-verify)
    answer_pattern: str = r"(?s)(.*)"  # first group of the last match in the text after the think block is the answer

    def __post_init__(self):
        self._answers: Answers = (
            MathAnswers("reward_settings.right_answer.answer")
            if self.answer == "math"
            else PatternAnswers(self.answer_pattern, "reward_settings.right_answer.answer_pattern")
        )

    def value(self, rollout):
        expected = self._answers.find(parts_of(rollout.reference, opened_in_prompt=rollout.opened).answer)
        if not expected:
            return None
        found = self._answers.find(parts_of(rollout.reply, opened_in_prompt=rollout.opened).answer)
        return float(self._answers.agree(expected, found))


@reward("follows_mode")
class FollowsMode(Reward):
    """1 where the reply ends by itself, its think block is closed, and it thinks if and only if the row's own reply
    does; else 0."""

    def value(self, rollout):
        asked = parts_of(rollout.reference, opened_in_prompt=rollout.opened)
        found = parts_of(rollout.reply, opened_in_prompt=rollout.opened)
        return float(
            rollout.stopped and not found.unclosed and bool(found.reasoning.strip()) == bool(asked.reasoning.strip())
        )


@reward("soft_overlong")
@dataclass
class SoftOverlong(Reward):
    """0 for a short reply, falling to -1 at the longest that is allowed.

    Eq. 13 of arXiv:2503.14476: (max - buffer - length) / buffer within the buffer.
    """

    buffer: int = count(128)  # tokens before max_new_tokens within which the reward falls

    def value(self, rollout):
        return min(0.0, max(-1.0, (rollout.max_tokens - self.buffer - rollout.num_tokens) / self.buffer))
