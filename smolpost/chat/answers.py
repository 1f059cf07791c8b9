"""What a reply answers, and whether that is the right answer: equal as text, or as mathematics."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from smolpost.chat.reasoning import OPEN, ends_thinking, split_reasoning
from smolpost.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_END = 16  # tokens: the opening of a think block, a byte each, and the line breaks after it


class Parts(NamedTuple):
    """A reply, taken apart.

    Attributes:
        reasoning: Text of the think blocks; "" where there is none.
        answer: The text after them; "" where the block never closed.
        unclosed: The reply ended inside a think block.
    """

    reasoning: str
    answer: str
    unclosed: bool


def parts_of(reply: str, *, opened_in_prompt: bool = False) -> Parts:
    """A reply's reasoning and answer, as `split_reasoning` finds them, and whether the reasoning ever ended."""
    reasoning, answer = split_reasoning(reply, opened_in_prompt=opened_in_prompt)
    unclosed = ends_thinking(reply, opened_in_prompt=opened_in_prompt)
    return Parts(reasoning or "", "" if unclosed else answer, unclosed)


def opens_thinking(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> bool:
    """Whether a prompt (token ids) ends inside a think block that its template opened."""
    return tokenizer.decode(ids[-PROMPT_END:]).rstrip().endswith(OPEN)


class Answers(Protocol):
    """A kind of answer."""

    def find(self, text: str) -> Any:
        """What a text after the think block answers; something empty where it answers nothing."""

    def agree(self, expected: Any, found: Any) -> bool:
        """Whether two findings are the same answer."""

    def shown(self, found: Any) -> str:
        """The finding for a reader."""


class PatternAnswers:
    """Texts that a regular expression finds; equal ones agree.

    Args:
        pattern: The first group of its last match is the answer. Empty matches do not count, as `.*` has one at the
            end of any text.
        key: Of the pattern in the recipe, for messages.
    Raises:
        UserError: The pattern is no regular expression with a group.
    """

    def __init__(self, pattern: str, key: str):
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{key}={pattern!r} is not a regular expression ({error}); mend it, "
                "or use '(?s)(.*)' for the whole text after the think block"
            ) from error
        if self.pattern.groups == 0:
            raise UserError(
                f"{key}={pattern!r} has no group to hold the answer; put parentheses around the part that is the answer"
            )

    def find(self, text: str) -> str:
        matches = [match for match in self.pattern.finditer(text) if match.group()]
        return (matches[-1].group(1) or "").strip() if matches else ""

    def agree(self, expected: str, found: str) -> bool:
        return expected == found

    def shown(self, found: str) -> str:
        return found


class MathAnswers:
    """Expressions that math-verify reads: numbers, fractions, LaTeX, the content of `\\boxed`; equal values agree.

    Its limit of five seconds per expression is an alarm signal, so it refuses to work outside the main thread. What it
    cannot decide in time does not agree.

    Args:
        key: Of the kind of answer in the recipe, for messages.
    Raises:
        UserError: math-verify is not installed.
    """

    def __init__(self, key: str):
        try:
            import math_verify
        except ImportError as error:
            raise UserError(
                f"{key}=math needs math-verify, which is not installed; install it with `pip install 'smolpost[eval]'`"
            ) from error
        self.library = math_verify

    def find(self, text: str) -> list:
        # An escaped dollar is money; math-verify takes it for the border of a formula and then finds nothing.
        return self.library.parse(text.replace("\\$", ""))

    def agree(self, expected: list, found: list) -> bool:
        return bool(found) and self.library.verify(expected, found)

    def shown(self, found: list) -> str:
        return str(found[-1]) if found else ""
