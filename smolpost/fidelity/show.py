"""The table for a terminal of any width, and for docs/recipe.md."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from smolpost.errors import UserError
from smolpost.fidelity.published import SOURCES
from smolpost.fidelity.table import REFERENCE, Cell, Line, Section

MARK = "!= "  # before what a source says otherwise
LEGEND = f"{MARK}marks a source that says another value than this pipeline."
BEGIN, END = "<!-- the table of smollm3 -->", "<!-- end of the table -->"


def terminal(sections: Sequence[Section]) -> Iterator[RenderableType]:
    """What to print, one after another."""
    yield LEGEND
    for section in sections:
        yield Text(f"\n{_heading(section)}", style="bold")
        yield _table(section)
        yield from (f"{line.key}: {line.why}" for line in section.lines if line.why)
        if section.changed:
            yield _changed(section)


def _table(section: Section) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), expand=True)
    for head in ("value", *SOURCES, "ours"):
        table.add_column(head, overflow="fold", ratio=6 if head == "value" else 5)
    for line in section.lines:
        name = Text(line.key).append(f"\n{line.what}" if line.what else "", style="dim")
        said = [Text(_said(cell), style="yellow" if cell.differs else "") for cell in line.said]
        table.add_row(name, *said, Text(line.ours, style="bold"))
    return table


def markdown(sections: Sequence[Section]) -> str:
    """The same as Markdown, a table for each stage."""
    parts = [f"`{MARK.strip()}` marks a source that says another value than this pipeline.", ""]
    for section in sections:
        parts += [f"### {_heading(section)}", "", _row("value", *SOURCES, "ours", "why"), _row(*["---"] * 6)]
        parts += [_markdown_line(line) for line in section.lines]
        parts += ["", *([_changed(section), ""] if section.changed else [])]
    return "\n".join(parts)


def rewrite(page: Path, sections: Sequence[Section]) -> None:
    """Put the table between the two comment lines of a Markdown page.

    Raises:
        UserError: The page has no such lines.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{page} has no line `{BEGIN}` with `{END}` after it; add both where the table is to stand")
    page.write_text(f"{before}{begin}\n\n{markdown(sections)}\n{end}{after}", encoding="utf-8")


def _heading(section: Section) -> str:
    return f"{section.title}: stage {section.stage}"


def _said(cell: Cell) -> str:
    return f"{MARK}{cell.text}" if cell.differs else cell.text


def _changed(section: Section) -> str:
    return f"Changed from {REFERENCE}: {'; '.join(section.changed)}."


def _markdown_line(line: Line) -> str:
    said = [f"`{MARK.strip()}` {cell.text}" if cell.differs else cell.text for cell in line.said]
    return _row(f"`{line.key}`" + (f", {line.what}" if line.what else ""), *said, f"**{line.ours}**", line.why)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
