"""What preparation did to each source: counted, written beside the rows, shown as a table."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.text import Text

from smolpost.data.rendering import NOTES
from smolpost.screen import Blocks

REPORT = "data_report.json"
PERCENTILES = (50, 90, 99, 100)
TITLES = ("rows", "think", "tokens", "trained", "masked", "cut", "dropped", "p50/p99/max")
COUNTS = (
    "rows_available",
    "rows_read",
    "rows_kept",
    "rows_repeated",
    "rows_duplicate",
    "rows_truncated",
    "rows_split",
    "think_rows",
    "no_think_rows",
    "tokens_read",
    "tokens_unknown",
    "tokens_neutralised",
    "tokens_trained",
    "tokens_masked",
    "tokens_truncated",
    "tokens_dropped",
    "tokens_shared",
)
COUNTERS = ("masked", "dropped", "unread", "notes")  # of a source: name -> number


def new_source() -> dict:
    """The entry of a source nothing is known of: tokens_read is trained + masked + truncated + dropped.

    Rows: available in the source; read, as often as they are taken; kept, of those; repeated, taken before; duplicate,
    of the tokens of an earlier row. think_rows train a think block; texts are neither think nor no-think rows.
    Tokens: unknown, of those read, stand for characters the tokenizer has no token for; neutralised were control
    tokens in a row's own text; shared, of a pair's prompt, serve both of its sides. `masked` says why tokens_masked
    are not trained, `unread` which keys of its rows nobody reads, and how many rows have them, `notes` what rendering
    makes of how many of the kept ones (`rendering.NOTES`).
    """
    return {**dict.fromkeys(COUNTS, 0), **{key: {} for key in COUNTERS}, "length_percentiles": {}}


def percentiles(lengths) -> dict[str, int]:
    """Percentile -> tokens of a row, of those that occur."""
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return {str(percentile): int(value) for percentile, value in zip(PERCENTILES, values, strict=True)}


def write_report(folder: Path, settings: dict, sources: dict[str, dict], **totals) -> dict:
    """Sum the sources up and write `data_report.json`.

    Args:
        settings: What the rows were prepared with.
        sources: Name -> entry as by new_source, filled.
        totals: Further numbers of the whole, e.g. packs.
    Returns:
        The report: {"settings", "sources", "totals"}.
    """
    sums: dict = {key: sum(entry[key] for entry in sources.values()) for key in COUNTS}
    for key in COUNTERS:
        sums[key] = dict(sum((Counter(entry[key]) for entry in sources.values()), Counter()))
    report = {"settings": settings, "sources": sources, "totals": {**sums, **totals}}
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


def format_report(report: dict) -> Group:
    """A row per source and one for the whole, in rounded numbers that fit a terminal; data_report.json has them all."""
    settings, totals = report["settings"], report["totals"]
    title = ", ".join(f"{key} {value}" for key, value in settings.items())
    tables: list[Blocks | str] = [source_table(report, TITLES, cells, title=title)]
    if reasons := tuple(totals["masked"]):
        masked = lambda entry: [short(entry["masked"].get(reason, 0)) for reason in reasons]  # noqa: E731
        tables += ["", source_table(report, reasons, masked, title="masked tokens by reason")]
    return Group(*tables, "", Text(caption(totals)), *map(Text, [*unread_lines(report), *note_lines(report)]))


def unread_lines(report: dict) -> list[str]:
    """A line for each source that has keys which nobody reads."""
    return [
        f"not read in {name}: "
        + ", ".join(f"{key} ({count:,} row{'s' * (count > 1)})" for key, count in entry["unread"].items())
        for name, entry in report["sources"].items()
        if entry.get("unread")
    ]


def note_lines(report: dict) -> list[str]:
    """A line for each note of a source, with the rows that have it and what to do."""
    lines = []
    for name, entry in report["sources"].items():
        for note, count in entry.get("notes", {}).items():
            share = f"{count:,} of {entry['rows_kept']:,} rows ({count / entry['rows_kept']:.0%})"
            lines.append(f"{name}: {share} {NOTES[note]}")
    return lines


def source_table(report: dict, heads: tuple[str, ...], cells_of: Callable[[dict], list[str]], title: str) -> Blocks:
    rows = [[name, *cells_of(entry)] for name, entry in report["sources"].items()]
    several = len(rows) > 1
    if several:
        rows.append(["all", *cells_of(report["totals"])])
    return Blocks(["source", *heads], rows, title=title, last_is_sum=several)


def cells(entry: dict) -> list[str]:
    lengths = entry.get("length_percentiles", {})
    return [
        f"{entry['rows_read']:,}",
        f"{entry['think_rows'] / max(1, entry['rows_kept']):.0%}",
        short(entry["tokens_read"]),
        short(entry["tokens_trained"]),
        short(entry["tokens_masked"]),
        f"{entry['rows_truncated'] + entry['rows_split']:,}",
        f"{sum(entry['dropped'].values()):,}",
        "/".join(short(lengths[key]) for key in ("50", "99", "100") if key in lengths),
    ]


def short(number: int) -> str:
    """1,234 -> 1.23k: three digits and a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def caption(totals: dict) -> str:
    if "packs" in totals:
        whole = (
            f"{totals['packs']:,} packs of {totals['tokens_per_pack']:,.0f} tokens on average, "
            f"{totals['fill_percent']:.1f}% full"
        )
    else:
        once = totals["tokens_trained"] + totals["tokens_masked"]
        saved = totals["tokens_shared"] / (once + totals["tokens_shared"])
        whole = (
            f"{totals['pairs']:,} pairs of {totals['tokens_per_pair']:,.0f} tokens on average, {saved:.0%} fewer than "
            "as two sequences each"
        )
    notes = [f"{count:,} rows dropped: {reason}" for reason, count in totals["dropped"].items()]
    for key, what in (
        ("rows_duplicate", "rows with the tokens of an earlier one"),
        ("rows_repeated", "rows taken again"),
        ("tokens_unknown", "tokens unknown to the tokenizer"),
        ("tokens_neutralised", "control tokens in the rows' own text, kept as plain text"),
    ):
        if totals[key]:
            notes.append(f"{totals[key]:,} {what}")
    return "; ".join([whole, *notes])
