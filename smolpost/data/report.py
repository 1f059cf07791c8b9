"""What preparation did to each source: counted, written beside the rows, shown as a table."""

import json
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

REPORT = "data_report.json"
PERCENTILES = (50, 90, 99, 100)
TITLES = ("rows", "think", "tokens", "trained", "masked", "cut", "dropped", "p50/p99/max")
COUNTS = (
    "rows_read",
    "rows_kept",
    "rows_truncated",
    "rows_split",
    "think_rows",
    "no_think_rows",
    "tokens_read",
    "tokens_unknown",
    "tokens_trained",
    "tokens_masked",
    "tokens_truncated",
    "tokens_dropped",
    "tokens_shared",
)


def new_source() -> dict:
    """The entry of a source nothing is known of: tokens_read is trained + masked + truncated + dropped.

    think_rows train a think block; texts are neither think nor no-think rows. tokens_unknown, of those read, stand
    for characters the tokenizer has no token for; tokens_shared, of a pair's prompt, serve both of its sides.
    """
    return {**dict.fromkeys(COUNTS, 0), "dropped": {}, "length_percentiles": {}}


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
    dropped = {}
    for entry in sources.values():
        for reason, count in entry["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + count
    sums = {key: sum(entry[key] for entry in sources.values()) for key in COUNTS}
    report = {"settings": settings, "sources": sources, "totals": {**sums, "dropped": dropped, **totals}}
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


def format_report(report: dict) -> Table:
    """A row per source and one for the whole, in rounded numbers that fit a terminal; data_report.json has them all."""
    settings, totals = report["settings"], report["totals"]
    title = ", ".join(f"{key} {value}" for key, value in settings.items())
    table = Table(title=title, caption=caption(totals), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("source")
    for name in TITLES:
        table.add_column(name, justify="right", no_wrap=True)
    for name, entry in report["sources"].items():
        table.add_row(name, *cells(entry))
    if len(report["sources"]) > 1:
        table.add_section()
        table.add_row("all", *cells(totals))
    return table


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
    if totals["tokens_unknown"]:
        notes.append(f"{totals['tokens_unknown']:,} tokens unknown to the tokenizer")
    return "; ".join([whole, *notes])
