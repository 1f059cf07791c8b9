"""Whether an answer is in the language that it should be in."""

import re
from collections.abc import Collection
from functools import lru_cache

from smolpost.data.hygiene import detected_language
from smolpost.data.overlap import words_of
from smolpost.synthesis.filters.form import PASSED
from smolpost.synthesis.records import Verdict

READ_CHARACTERS = 8000  # of a text
PART_CHARACTERS = 250  # from its beginning, middle and end each
PART_WORDS = 8  # fewer are often taken for another language
_NOT_PROSE = re.compile(
    r"(?s)```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[a-zA-Z]+(?:\{[^{}]*\})*|https?://\S+"
)


def same_language(question: str, answer: str, min_confidence: float) -> Verdict:
    """Beginning, middle and end of the answer are in languages of the question; "language" otherwise.

    A question in English about a German text may be answered in both. A translation into a third language does not
    pass. Code, formulas, addresses, and parts of few words do not count.

    Args:
        question: Text of the user turn.
        answer: Without reasoning.
        min_confidence: Of the detector (lingua), in (0, 1]. Parts whose language is less certain do not count.
    Returns:
        Score: the confidence in the other language, or the least in the right ones; None where nothing is certain.
    """
    asked = _languages(question, min_confidence)
    return _in_one_of(asked, answer, min_confidence) if asked else PASSED


def in_language(answer: str, code: str, min_confidence: float) -> Verdict:
    """The answer is in a language (ISO 639-1); as `same_language`."""
    return _in_one_of({code}, answer, min_confidence)


def _in_one_of(codes: Collection[str], answer: str, min_confidence: float) -> Verdict:
    given = _languages(answer, min_confidence)
    for code, confidence in given.items():
        if code not in codes:
            return Verdict(False, "language", confidence)
    return PASSED._replace(score=min(given.values(), default=None))


def _languages(text: str, min_confidence: float) -> dict[str, float]:
    """Code -> confidence of the languages that some part of a text is in."""
    prose = _NOT_PROSE.sub(" ", text[:READ_CHARACTERS]).strip()
    found = (_detected(part) for part in _parts(prose) if len(words_of(part)) >= PART_WORDS)
    return {code: confidence for code, confidence in found if confidence >= min_confidence}


def _parts(text: str) -> list[str]:
    if len(text) <= 2 * PART_CHARACTERS:
        return [text]
    middle = (len(text) - PART_CHARACTERS) // 2
    return [text[:PART_CHARACTERS], text[middle:][:PART_CHARACTERS], text[-PART_CHARACTERS:]]


@lru_cache(maxsize=1024)
def _detected(part: str) -> tuple[str, float]:
    """Kept, as several replies may answer one question."""
    return detected_language(part)
