"""Templates with a fixed date: the tokens of a row must be the same tomorrow, and the same in an evaluation.

A template asks for the date by a variable, or by transformers' `strftime_now` with a format. Lines put before the
template's own text answer both with the recipe's `today`. So all renderers give the same text, even those that take
only a template.
"""

import json
from datetime import datetime
from functools import cache

import jinja2

from smolpost.errors import UserError

#: How `today` may be written where a template asks for the date in a format.
FORMATS = ("%d %B %Y", "%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%b %d, %Y")
_CLOCK = "strftime_now"
#: Variables under which templates expect the date as a text, beside ours, `today`.
DATES = ("date_string", "current_date", "datetime")


@cache
def frozen(template: str, today: str) -> str:
    """The template with the date `today` wherever it asks for the date.

    `strftime_now(format)` gives that day, at midnight, in the format. The variables of DATES are `today` as it is
    written, unless a row sets them. A template that calls `strftime_now` fills them itself, in its own format.

    Args:
        template: Text of a chat template.
        today: A date. If the template calls `strftime_now`, it must be in one of FORMATS; otherwise rendering refuses
            it in one line.
    Raises:
        UserError: The template draws random numbers.
    """
    words = _words(template)
    names = _names(words)
    for name in ("lipsum", "|random"):
        if name in names:
            raise UserError(
                f"the chat template calls {name.removeprefix('|')}, which gives a row different tokens each time; "
                "remove it from the template"
            )
    lines = [f"{{%- set today = {_literal(today)} %}}\n"]
    if _CLOCK in names:
        lines.append(_stopped_clock(today, [word for kind, word in words if kind == "string" and "%" in word]))
    else:
        lines += [f"{{%- set {name} = {name}|default({_literal(today)}) %}}\n" for name in DATES if name in names]
    return "".join(lines) + template


def _stopped_clock(today: str, formats: list[str]) -> str:
    """A macro in place of `strftime_now` that knows the formats written in the template."""
    day = _parsed(today)
    if day is None:
        message = (
            f"today={today!r} is not a date, and the chat template asks for the date in a format; "
            "write it like 08 July 2025 or 2025-07-08"
        )
        body = f"{{{{- raise_exception({_literal(message)}) }}}}"
    else:
        days = ", ".join(f"{_literal(text)}: {_literal(day.strftime(text))}" for text in dict.fromkeys(formats))
        message = "the chat template computes a date format; write the format as a string in the call of strftime_now"
        body = (
            f"{{%- set days = {{{days}}} %}}"
            f"{{{{- days[format] if format in days else raise_exception({_literal(message)}) }}}}"
        )
    return f"{{%- macro {_CLOCK}(format) %}}{body}{{%- endmacro %}}\n"


def _parsed(today: str) -> datetime | None:
    for text in FORMATS:
        try:
            return datetime.strptime(today.strip(), text)
        except ValueError:
            continue
    return None


def _names(words: list[tuple[str, str]]) -> set[str]:
    """The variables and functions that the template reads, and its filters as `|NAME`; not keys and attributes."""
    names, objects = set(), set()
    for before, word, after in zip([("", ""), *words], words, [*words[1:], ("", "")], strict=False):
        if word[0] == "name" and before[0] != "dot":
            names.add(f"|{word[1]}" if before[0] == "pipe" else word[1])
            if after[0] in ("dot", "lparen") and word[1] in DATES:
                objects.add(word[1])  # used as an object: rendering reports that it is undefined
    return names - objects


def _words(template: str) -> list[tuple[str, str]]:
    """(kind, text) of the words in the template's code; empty if it is not valid jinja, which rendering reports."""
    try:
        return [(token.type, str(token.value)) for token in jinja2.Environment().lexer.tokenize(template)]
    except jinja2.TemplateSyntaxError:
        return []


def _literal(text: str) -> str:
    """The text as jinja's string; its escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)
