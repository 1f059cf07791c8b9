"""Templates whose clock stands still: the tokens of a row must be the same tomorrow, and in an evaluation.

A template asks for the date in its own way: by a variable, or by transformers' `strftime_now` with a format. Both get
the recipe's `today` from lines put before the template's own, so that every renderer of the text agrees, also those
that can be given nothing but a template.
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
    written, unless a row sets them; a template that calls `strftime_now` fills them itself, in its own format.

    Args:
        template: Text of a chat template.
        today: A date; it has to be written in one of FORMATS where the template calls `strftime_now`, else rendering
            refuses it in one line.
    Raises:
        UserError: The template draws random numbers.
    """
    words = _words(template)
    names = _names(words)
    for name in ("lipsum", "|random"):
        if name in names:
            raise UserError(
                f"the chat template calls {name.removeprefix('|')}, which gives a row other tokens each time; take it "
                "out of the template"
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
        message = "the chat template puts a date's format together; write it out in the call of strftime_now"
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
                objects.add(word[1])  # an object of some kind: rendering says that it is not defined
    return names - objects


def _words(template: str) -> list[tuple[str, str]]:
    """(kind, text) of the words in the template's code; none where it is no jinja, which rendering says."""
    try:
        return [(token.type, str(token.value)) for token in jinja2.Environment().lexer.tokenize(template)]
    except jinja2.TemplateSyntaxError:
        return []


def _literal(text: str) -> str:
    """The text as jinja's string; its escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)
