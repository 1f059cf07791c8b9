"""The console that commands print on: texts of users, paths and names appear as they are."""

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

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


LEAST = 6  # characters of a text that is masked; shorter ones stand in other words, too


class _Masked:
    """A stream in whose text some words are written by a name."""

    def __init__(self, stream: TextIO, names: dict[str, str]):
        self._stream, self._names = stream, names

    def write(self, text: str) -> int:
        for hidden, name in self._names.items():
            text = text.replace(hidden, name)
        return self._stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def mask(names: dict[str, str]) -> None:
    """From now on, print these texts by their names.

    Args:
        names: Text -> what is printed in its place; texts shorter than LEAST are printed as they are.
    """
    names = {hidden: names[hidden] for hidden in sorted(names, key=len, reverse=True) if len(hidden) >= LEAST}
    for stream in ("stdout", "stderr") if names else ():
        setattr(sys, stream, _Masked(getattr(sys, stream), names))
