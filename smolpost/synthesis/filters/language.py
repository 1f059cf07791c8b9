"""Whether an answer is in the language that it should be in."""

import re

from smolpost.data.hygiene import detected_language
from smolpost.data.overlap import words_of
from smolpost.synthesis.filters.form import PASSED
from smolpost.synthesis.records import Verdict

LANGUAGE_CHARACTERS = 1000  # of each text; the detector reads about 1 MB/s and needs no more
LANGUAGE_WORDS = 8  # fewer are often taken for another language
_NOT_PROSE = re.compile(
    r"(?s)```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[a-zA-Z]+(?:\{[^{}]*\})*|https?://\S+"
)


def same_language(question: str, answer: str, min_confidence: float) -> Verdict:
    """The answer is in the language of the question, as far as both can be told; "language" otherwise.

    A translation, which should be in another language, does not pass.

    Args:
        question: Text of the user turn.
        answer: Without reasoning.
        min_confidence: Of the detector (lingua), in (0, 1]. A text whose language is less certain stays.
    Returns:
        Score: the confidence in the answer's language.
    """
    asked = _language(question, min_confidence)
    return in_language(answer, asked[0], min_confidence) if asked else PASSED


def in_language(answer: str, code: str, min_confidence: float) -> Verdict:
    """The answer is in a language (ISO 639-1), as far as it can be told; arguments and result as `same_language`."""
    given = _language(answer, min_confidence)
    if not given:
        return PASSED
    return Verdict(given[0] == code, "" if given[0] == code else "language", given[1])


def _language(text: str, min_confidence: float) -> tuple[str, float] | None:
    """Code and confidence; None where words are few or the detector is not certain.

    Code, formulas and addresses are left out.
    """
    prose = _NOT_PROSE.sub(" ", text[: 4 * LANGUAGE_CHARACTERS])[:LANGUAGE_CHARACTERS]
    if len(words_of(prose)) < LANGUAGE_WORDS:
        return None
    code, confidence = detected_language(prose)
    return (code, confidence) if confidence >= min_confidence else None
