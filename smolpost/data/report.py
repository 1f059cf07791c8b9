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
    """An empty entry of a source. In a filled one, tokens_read = trained + masked + truncated + dropped.

    Rows: available in the source; read, counted as often as they are taken; kept; repeated, taken more than once;
    duplicate, with the tokens of an earlier row. think_rows train a think block; texts are neither think nor no-think
    rows. Tokens: unknown, characters without a token of the tokenizer; neutralised, control tokens in a row's own text;
    shared, prompt tokens that serve both sides of a pair. `masked` counts tokens_masked by reason, `unread` the rows
    with each key that is not read, `notes` the kept rows with each note on their rendering (`rendering.NOTES`).
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
        totals: Further numbers of the mixture, e.g. packs.
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
    """A row for each source and one for the total, rounded to fit a terminal; data_report.json has all digits."""
    settings, totals = report["settings"], report["totals"]
    title = ", ".join(f"{key} {value}" for key, value in settings.items())
    tables: list[Blocks | str] = [_source_table(report, TITLES, cells, title=title)]
    if reasons := tuple(totals["masked"]):
        masked = lambda entry: [short(entry["masked"].get(reason, 0)) for reason in reasons]  # noqa: E731
        tables += ["", _source_table(report, reasons, masked, title="masked tokens by reason")]
    lines = [caption(totals), *_label_lines(report), *_unread_lines(report), *_note_lines(report)]
    return Group(*tables, "", *map(Text, lines))


def _label_lines(report: dict) -> list[str]:
    """A line for each of several sources with labels."""
    lines = [(name, entry["labels"]) for name, entry in report["sources"].items() if "labels" in entry]
    if len(lines) < 2:
        return []
    return [f"{name}: {counts['desired']:,} desired, {counts['undesired']:,} undesired" for name, counts in lines]


def _unread_lines(report: dict) -> list[str]:
    """A line for each source with keys that are not read."""
    return [
        f"not read in {name}: "
        + ", ".join(f"{key} ({count:,} row{'s' * (count > 1)})" for key, count in entry["unread"].items())
        for name, entry in report["sources"].items()
        if entry.get("unread")
    ]


def _note_lines(report: dict) -> list[str]:
    """A line for each note of a source, with the rows that have it and what to do."""
    lines = []
    for name, entry in report["sources"].items():
        for note, count in entry.get("notes", {}).items():
            share = f"{count:,} of {entry['rows_kept']:,} rows ({count / entry['rows_kept']:.0%})"
            lines.append(f"{name}: {share} {NOTES[note]}")
    return lines


def _source_table(report: dict, heads: tuple[str, ...], cells_of: Callable[[dict], list[str]], title: str) -> Blocks:
    rows = [[name, *cells_of(entry)] for name, entry in report["sources"].items()]
    several = len(rows) > 1
    if several:
        rows.append(["all", *cells_of(report["totals"])])
    return Blocks(["source", *heads], rows, title=title, last_is_sum=several)


def cells(entry: dict) -> list[str]:
    """The cells of an entry, under TITLES."""
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
    """The line below the tables: packs or pairs, and further totals."""
    if "completions" in totals:
        labels = ", ".join(f"{count:,} {label}" for label, count in totals.get("labels", {}).items())
        labels = labels and f" ({labels})"
        whole = (
            f"{totals['completions']:,} completions{labels} of "
            f"{totals['tokens_per_completion']:,.0f} tokens on average with their prompts"
        )
    elif "packs" in totals:
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
