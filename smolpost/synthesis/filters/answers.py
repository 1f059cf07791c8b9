"""Whether an answer is right: equal to the reference as text, as a number, or as mathematics (math-verify).

Only the answer is read, never the reasoning, which holds wrong intermediate results.
"""

import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from typing import Any

from smolpost.chat.answers import MathAnswers, parts_of
from smolpost.chat.render import text_of
from smolpost.synthesis.filters.form import PASSED
from smolpost.synthesis.records import Verdict

WRONG = Verdict(False, "wrong_answer", 0.0)
RIGHT = PASSED._replace(score=1.0)
NO_REFERENCE = Verdict(False, "no_reference")
UNDECIDED = Verdict(False, "undecided")

ANSWER_CHARACTERS = 10_000  # at the end of a text, in which its answer is looked for
REFERENCE_WORDS = 25  # a longer reference that marks no answer is prose, which cannot be compared
_HASHES = re.compile(r"(?m)^[ \t]*####[ \t]*(.+)$")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_STATED = re.compile(r"(?i)\banswer\b[^\n.:=]{0,40}?(?::|=|\bis\b)[ \t*:]*(\S(?:[^\n.]|\.(?=\w))*)")
_EMPHASIS = " \t\r\n*_`$"
_PUNCTUATION = ".,;:"
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3}){1,10}|\d{1,40})(?:\.\d{1,40})?")
_WORD = re.compile(r"(?<![\\a-zA-Z])(?!(?:sqrt|sin|cos|tan|log|exp|pi|max|min)\b)[^\W\d_]{3,}")
_SPACES = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_CHOICE = re.compile(r"\(?([A-J])(?:[).:,]|\s|$)")


def reference_of(row: Mapping[str, Any]) -> str:
    """The answer in a row's last assistant turn, of a pair in its chosen side's; "" where there is none."""
    messages = row.get("messages") or row.get("chosen") or []
    if messages and messages[-1].get("role") == "user":  # what is to be answered; earlier turns answer other questions
        return ""
    turns = [message for message in messages if message.get("role") == "assistant"]
    return parts_of(text_of(turns[-1].get("content"))).answer.strip() if turns else ""


def right_answer(reference: str, answer: str) -> Verdict:
    """The answer is the reference's: "wrong_answer", or "no_reference" where the reference has no answer to compare.

    Needs the main thread, as math-verify limits its time by alarms, which do not stop a long integer power:
    `answer_workers.verify_answers` has none of these limits.

    Args:
        reference: A right reply or just its answer. What counts is the text after `####`, else in the last `\\boxed`,
            else after "answer is" or "answer:", else all of it up to REFERENCE_WORDS words.
        answer: Text after the reasoning. Its answer is found in the same way, else by math-verify in all of it.
    Returns:
        Score: 1 or 0; None without a reference.
    """
    return quick_verdict(reference, answer) or _by_mathematics(reference, answer)


def quick_verdict(reference: str, answer: str) -> Verdict | None:
    """The verdict where it takes no mathematics; otherwise None.

    Equal texts and equal numbers are right. Different plain numbers, a different option of a multiple choice and an
    answer without content are wrong.
    """
    expected, found = _expected(reference), _found(answer)
    if not expected:
        return NO_REFERENCE
    if not answer.strip():
        return WRONG
    given = found or answer[-ANSWER_CHARACTERS:]
    if _plain(expected) == _plain(given):
        return RIGHT
    if len(option := expected.strip(" ().")) == 1 and "A" <= option <= "J":
        choice = _CHOICE.match(given.lstrip(" *"))
        return RIGHT if choice and choice.group(1) == option else WRONG
    numbers = _number(expected), _number(given)
    if None not in numbers:
        return RIGHT if numbers[0] == numbers[1] else WRONG
    if not any(map(str.isdigit, expected)) and not re.search(r"[\\+*/^=<>]", expected):
        return WRONG  # words, which math-verify would take for products of their letters
    return None


def _by_mathematics(reference: str, answer: str) -> Verdict:
    math = _math()
    expected = math.find(_formula(_expected(reference)))
    found = math.find(_formula(_found(answer) or answer[-ANSWER_CHARACTERS:]))
    return RIGHT if expected and math.agree(expected, found) else WRONG


@cache
def _math() -> MathAnswers:
    return MathAnswers("filters.answer")


def _expected(reference: str) -> str:
    found = _found(reference)
    return found if found or len(reference.split(maxsplit=REFERENCE_WORDS)) > REFERENCE_WORDS else reference.strip()


def _found(text: str) -> str:
    """The answer that a text marks as such; "" where it marks none."""
    text = text[-ANSWER_CHARACTERS:]
    if matches := _HASHES.findall(text):
        return _bare(matches[-1])
    if openings := list(_BOXED.finditer(text)):
        return _bare(_until_closed(text, openings[-1].end()))
    # "This answer is consistent with the table" states none.
    stated = (match for match in reversed(_STATED.findall(text)) if not match[0].islower() or len(match.split()) <= 2)
    return _bare(next(stated, ""))


def _until_closed(text: str, start: int) -> str:
    """The text from a place inside braces to the brace that closes them, or to the end."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return text[start:]


def _bare(text: str) -> str:
    """Without marks of emphasis, borders of a formula, and punctuation at its edges."""
    text = text.replace("\\$", "").strip(_EMPHASIS).rstrip(_PUNCTUATION + _EMPHASIS)
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        text = text.removeprefix(opening).removesuffix(closing)
    return text.strip(_EMPHASIS)


def _plain(text: str) -> str:
    """For comparisons: without case, Unicode form, text commands of LaTeX, and white space but between digits."""
    text = unicodedata.normalize("NFKC", _bare(_TEXT_COMMAND.sub(r"\1", text))).casefold()
    return _SPACES.sub("", text)


def _number(text: str) -> Decimal | None:
    text = _bare(text).lstrip("€£$")
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _formula(text: str) -> str:
    """An answer that is only mathematics in a form that math-verify reads in full; any other text as it is.

    Of plain text it takes a single number or fraction: the 4 of (3, 4). A percentage it reads in plain text only.
    """
    if _WORD.search(_TEXT_COMMAND.sub("", text)) or text.rstrip().endswith("%"):
        return text.replace("\\%", "%")
    return "\\boxed{" + _bare(text) + "}"
