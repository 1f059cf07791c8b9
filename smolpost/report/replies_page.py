"""Replies of several models to the same prompts as one HTML page: a prompt in each section, a model in each column."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolpost.report.html import check_is_ours, write_html
from smolpost.report.replies import HINTS, MODE_NAMES, Column, Prompt, ShownReply, facts, known_hints
from smolpost.report.samples import turn_of
from smolpost.report.show_samples import plain


def write_replies_page(
    columns: Sequence[Column],
    prompts: Sequence[Prompt],
    replies: Mapping[int, Sequence[ShownReply]],
    settings: Mapping[str, Any],
    file: Path,
) -> int:
    """Write the page.

    Args:
        replies: As `shown_replies` gives them.
        settings: Name -> value, of the sampling.
        file: Replaced in one step if it is such a page; its folder exists.
    Returns:
        Bytes written.
    Raises:
        UserError: The file cannot be written or is something else.
    """
    check_is_ours(file, "sample")
    heads, rows = facts([one for found in replies.values() for one in found])
    modes = list(dict.fromkeys(mode for column in columns for mode in column.modes))
    return write_html(
        file,
        "replies.html.jinja",
        command="sample",
        columns=columns,
        prompts=[_shown(number, prompt, replies[number], modes) for number, prompt in enumerate(prompts)],
        settings={name.replace("_", " "): value for name, value in settings.items()},
        heads=heads,
        rows=rows,
        modes={mode: MODE_NAMES[mode] for mode in modes},
        hints=known_hints(),
        explained=HINTS,
        plain=plain,
    )


def _shown(number: int, prompt: Prompt, replies: Sequence[ShownReply], modes: Sequence[str]) -> dict[str, Any]:
    """A prompt as the template reads it: its turns, and for each mode a cell of replies for each model."""
    cells: dict[str, dict[str, list[ShownReply]]] = {mode: {} for mode in modes}
    for one in replies:
        cells[one.mode].setdefault(one.model, []).append(one)
    return {
        "number": number + 1,
        "name": prompt.name,
        "turns": [turn_of(message) for message in prompt.messages],
        "tools": [str((tool.get("function") or tool).get("name")) for tool in prompt.tools or []],
        "cells": cells,
    }
