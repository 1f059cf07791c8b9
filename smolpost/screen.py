"""The console that commands print on. It shows users' texts, paths and names unchanged, and cuts no number."""

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

Cell = str | Text


def console(width: int | None = None) -> Console:
    """A console that takes no text for markup, emoji or numbers to colour: `[all]` in a setting is not a style.

    Args:
        width: In characters; None: the terminal's.
    """
    return Console(width=width, markup=False, emoji=False, highlight=False)


def command_line(words: Iterable[str]) -> str:
    """The words quoted for a shell, so that pasting them gives the same words."""
    return shlex.join(map(str, words))


class Blocks:
    """A table for any width: columns that do not fit go into another block below, which repeats the rows' names.

    Names fold where they must. A cell is never cut: a number without its last digits is another number.

    Args:
        heads: Of every column, in one line, or in two where columns side by side share the first one: it is then
            written once.
        rows: As many cells each, of any number of lines.
        names: The first columns, which name the rows and come with every block.
        styles: Of the rows.
        last_is_sum: Set the last row apart.
    """

    def __init__(
        self,
        heads: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        *,
        names: int = 1,
        title: str | None = None,
        styles: Sequence[str | None] | None = None,
        last_is_sum: bool = False,
    ):
        self.heads, self.rows, self.names, self.title = heads, rows, names, title
        self.styles = styles or [None] * len(rows)
        self.last_is_sum = last_is_sum

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Cell]:
        gap, blocks = 2, self._blocks(options.max_width, gap=2)
        if len(blocks) > 1:
            gap, blocks = 1, self._blocks(options.max_width, gap=1)
        if self.title:
            width = sum(blocks[0].values()) + gap * (len(blocks[0]) - 1)
            yield Text(" " * ((width - cell_len(self.title)) // 2) + self.title, style="table.title")
        for number, widths in enumerate(blocks):
            if number:
                yield ""
            yield self._table(widths, gap)

    def _blocks(self, width: int, gap: int) -> list[dict[int, int]]:
        """Column -> its characters, of each block."""
        columns = range(self.names, len(self.heads))
        names = {column: self._width(column) for column in range(self.names)}
        room = max(width // 2, width - sum(self._width(column) + gap for column in columns))
        while sum(names.values()) + gap * (self.names - 1) > room:
            names[max(names, key=names.__getitem__)] -= 1
        left = width - sum(names.values()) - gap * (self.names - 1)
        blocks, free = [dict(names)], left
        for column in columns:
            shared = column - 1 in blocks[-1] and self._shared(column)
            if self._width(column, shared) + gap > free and len(blocks[-1]) > self.names:
                blocks.append(dict(names))
                free, shared = left, False
            blocks[-1][column] = min(self._width(column, shared), left - gap)
            free -= blocks[-1][column] + gap
        return blocks

    def _shared(self, column: int) -> bool:
        """Whether the head's first line repeats the one to its left."""
        first, *more = self.heads[column].split("\n")
        return bool(more) and column > self.names and self.heads[column - 1].startswith(f"{first}\n")

    def _width(self, column: int, shared: bool = False) -> int:
        head = self.heads[column].split("\n")[shared:]
        return max(map(cell_len, head + [line for row in self.rows for line in str(row[column]).split("\n")]))

    def _table(self, widths: dict[int, int], gap: int) -> Table:
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, gap - 1))
        for column, width in widths.items():
            justify = "left" if column < self.names else "right"
            first, *more = self.heads[column].split("\n")
            head = ["" if column - 1 in widths and self._shared(column) else first, *more]
            table.add_column(Text("\n".join(head)), width=width, justify=justify, overflow="fold")
        for number, (row, style) in enumerate(zip(self.rows, self.styles, strict=True), 1):
            if self.last_is_sum and number == len(self.rows):
                table.add_section()
            cells = [row[column] for column in widths]
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)
        return table


def shown(path: Path) -> str:
    """The path as a user would type it here: relative if it is below this directory, else absolute."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith("..") else relative
