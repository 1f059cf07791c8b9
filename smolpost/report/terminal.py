"""Shows a prepared folder in the terminal: the ledger, then tokens by fate.

Every run of one fate begins with its word, and trained text is underlined. So nothing depends on colour alone, and a
pipe or NO_COLOR gives the same text.
"""

import re
import unicodedata
from collections import Counter

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from smolpost.chat.fates import Fate
from smolpost.data.report import format_report
from smolpost.report.fate_names import NAMES
from smolpost.report.inspect import Prepared
from smolpost.report.prepared_units import PackedDocument, PreparedCompletion, PreparedPair, TokenSequence

Item = PackedDocument | PreparedPair | PreparedCompletion
LINE_BREAK, TAB, SPACE = "↵", "⇥", "␣"
LIGHT = {Fate.TRAINED, Fate.SYSTEM, Fate.USER, Fate.TOOL, Fate.REPLY, Fate.REASONING}  # carry black text at 4.5:1
LABELS = {True: "  desired", False: "  undesired", None: ""}
WORD_WIDTH = max(len(name.word) for name in NAMES.values())


def show(
    prepared: Prepared,
    console: Console,
    *,
    source: str | None = None,
    row: str | None = None,
    pack: int | None = None,
    limit: int = 1,
) -> None:
    """Print the ledger, the legend and then tokens: of one pack, of the rows asked for, or of the first packs.

    A pair or completion is shown in place of a pack where the folder has those.

    Args:
        source, row: As `Prepared.find`; their documents, without the others of their packs.
        pack: Number of a pack, from 0.
        limit: Documents of rows asked for, or packs, at most; the last line says how many there are.
    Raises:
        UserError: As `Prepared.find` and `Prepared.pack`.
    """
    sft, others = prepared.layout == "documents", "pairs" if prepared.layout == "pairs" else "completions"
    dropped, total, what = [], len(prepared), "packs" if sft else others
    if pack is not None:
        items, total = _whole(prepared, [pack]), 1
    elif source is None and row is None:
        items = _whole(prepared, range(min(limit, len(prepared))))
    else:
        rows = prepared.find(source, row)
        dropped = prepared.dropped(rows)
        places = list(prepared.locate(rows))
        total, what = len(places), "documents" if sft else others
        items = [_whole(prepared, [p.pack])[p.document] for p in places[:limit]]
    _print(console, Text(f"{prepared.folder}  {prepared.layout}  key {prepared.manifest.get('key', 'none')}"))
    console.print(format_report(prepared.report))
    _legend(console, items)
    for item in items:
        if isinstance(item, PackedDocument):
            _show_document(prepared, console, item)
        else:
            _show_parts(prepared, console, item)
    for text in dropped:
        _print(console, Text(f"dropped: {text}"))
    shown = len({item.pack for item in items}) if what == "packs" else len(items)
    if pack is None:
        _print(console, Text(f"shown {shown:,} of {total:,} {what}"))


def _whole(prepared: Prepared, numbers) -> list[Item]:
    if prepared.layout == "documents":
        return [document for number in numbers for document in prepared.pack(number).documents]
    read = prepared.pair if prepared.layout == "pairs" else prepared.completion
    return [read(number) for number in numbers]


def _legend(console: Console, items: list[Item]) -> None:
    counts: Counter[int] = Counter()
    for item in items:
        for tokens in (item.tokens,) if isinstance(item, PackedDocument) else item.parts:
            counts.update(tokens.fates.tolist())
    _print(console, Text("tokens shown below, by fate"))
    for fate, name in NAMES.items():
        line = Text(f"{counts[fate]:>9,} ")
        line.append(f" {name.word} ", style=_colours(fate)).append(" " * (WORD_WIDTH - len(name.word) + 1))
        line.append(name.why, style="underline" if fate == Fate.TRAINED else "")
        _print(console, line)


def _show_document(prepared: Prepared, console: Console, document: PackedDocument) -> None:
    row, length = document.row, len(document.tokens.ids)
    if document.index == 0:
        console.print()
        _rule(console, "═", f"pack {document.pack}")
    part = f"{length:,} of its row's {row.tokens:,} tokens" if length < row.tokens else f"{length:,} tokens"
    mode = "think" if row.think else "no think"
    at = f"tokens {document.start:,} to {document.start + length - 1:,} of pack {document.pack}"
    _rule(console, "─", f"document {document.index}  {row.source}  {row.place}  {mode}  {part}  {at}")
    _show_tokens(prepared, console, document.tokens)


def _show_parts(prepared: Prepared, console: Console, item: PreparedPair | PreparedCompletion) -> None:
    console.print()
    mode, is_pair = "think" if item.row.think else "no think", isinstance(item, PreparedPair)
    title = f"pair {item.index}" if is_pair else f"completion {item.index}{LABELS[item.label]}"
    _rule(console, "═", f"{title}  {item.row.source}  {item.row.place}  {mode}")
    for part in item.parts:
        scored = int((part.fates == Fate.TRAINED).sum())
        shared = ", shared by both sides" if is_pair and part is item.prompt else ""
        _rule(console, "─", f"{part.name}  {len(part.ids):,} tokens{shared}, {scored:,} scored")
        _show_tokens(prepared, console, part)


def _show_tokens(prepared: Prepared, console: Console, tokens: TokenSequence) -> None:
    """One paragraph per stretch of a fate: its first position, its word, its text."""
    texts = prepared.texts(tokens.ids)
    positions = tokens.positions
    for fate, start, stop in tokens.runs():
        margin = Text(f"{positions[start]:>8,} ")
        margin.append(f" {NAMES[fate].word} ", style=_colours(fate)).append(" " * (WORD_WIDTH - len(NAMES[fate].word)))
        margin.append(" ")
        width = max(20, console.width - margin.cell_len)
        style = f"{_colours(fate)} underline" if fate == Fate.TRAINED else _colours(fate)
        for line in visible("".join(texts[start:stop])).removesuffix("\n").split("\n"):
            for piece in _folded(line, width):
                _print(console, margin + Text(piece, style=style))
                margin = Text(" " * margin.cell_len)


def _folded(line: str, width: int) -> list[str]:
    """The line in parts of at most `width` cells, cut after spaces if possible; nothing is stripped."""
    pieces, room = [""], width
    for word in re.findall(r"[^ ]* |[^ ]+$", line):
        for part in chop_cells(word, width) if cell_len(word) > width else [word]:
            if cell_len(part) > room and pieces[-1]:
                pieces.append("")
                room = width
            pieces[-1] += part
            room -= cell_len(part)
    return pieces


def _colours(fate: Fate) -> str:
    """Text and background, of a contrast that does not depend on the terminal's own colours."""
    if fate == Fate.TEMPLATE:
        return ""
    return f"{'#000000' if fate in LIGHT else '#FFFFFF'} on {NAMES[fate].colour}"


def _rule(console: Console, line: str, title: str) -> None:
    title = visible(title)
    _print(console, Text(f"{line * 2} {title} {line * max(2, console.width - len(title) - 5)}"))


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True, highlight=False)


def visible(text: str) -> str:
    """The text with its invisible characters written out; only line breaks still do what they say.

    A line break shows as ↵ and breaks the line, a tab as ⇥, spaces at either end of a line as ␣; characters that
    steer a terminal or turn the direction of writing become their code, so a text cannot hide what it says.
    """
    lines = []
    for line in text.split("\n"):
        inner = line.strip(" ")
        left = len(line) - len(line.lstrip(" ")) if inner else len(line)
        right = len(line) - left - len(inner)
        lines.append(SPACE * left + "".join(map(visible_character, inner)) + SPACE * right)
    return f"{LINE_BREAK}\n".join(lines)


def visible_character(character: str) -> str:
    if character == "\t":
        return TAB
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs") and character != "\u200d":
        return f"⟨U+{ord(character):04X}⟩"
    return character
