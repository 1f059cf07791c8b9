"""Pieces of a card: the YAML header that the Hub reads, tables, headings' bodies."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

_HEADER = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)


def header(content: Mapping[str, Any]) -> str:
    """A YAML header, with its fences."""
    return f"---\n{yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)}---\n"


def split_header(text: str) -> tuple[dict[str, Any], str]:
    """The header of a card and what follows it; {} and the whole text where there is none."""
    found = _HEADER.match(text)
    content = yaml.safe_load(found[1]) if found else None
    return (content, text[found.end() :]) if isinstance(content, dict) else ({}, text)


def table(heads: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table, with a last line break; whatever its cells hold, each stays one cell."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def replace_section(text: str, title: str, body: str) -> str:
    """The card with another text under the heading of the second level; without the section if the body is empty.

    A card that has no such section stays as it is.
    """
    new = f"## {title}\n\n{body}\n" if body else ""
    return re.sub(rf"(?ms)^## {re.escape(title)}\n.*?(?=^## |\Z)", lambda _: new, text)


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
