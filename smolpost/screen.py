"""The console that commands print on: texts of users, paths and names appear as they are."""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console


def console(width: int | None = None) -> Console:
    """A console that takes no text for markup, emoji or numbers to colour: `[all]` in a setting is not a style.

    Args:
        width: In characters; None: the terminal's.
    """
    return Console(width=width, markup=False, emoji=False, highlight=False)


def command_line(words: Iterable[str]) -> str:
    """The words as a shell takes them: pasted, they are the same words again."""
    return shlex.join(map(str, words))


def shown(path: Path) -> str:
    """The path as a user in this directory would type it: relative where it lies below, absolute elsewhere."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith("..") else relative
