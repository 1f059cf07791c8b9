"""What preparation did to each source: counted, written beside the rows, shown as a table."""

import json
from pathlib import Path

import numpy as np
from rich.table import Table

REPORT = "data_report.json"
PERCENTILES = (50, 90, 99, 100)
COUNTS = (
    "rows_read",
    "rows_kept",
    "rows_truncated",
    "rows_split",
    "think_rows",
    "no_think_rows",
    "tokens_read",
    "tokens_trained",
    "tokens_masked",
    "tokens_truncated",
    "tokens_dropped",
)


def new_source() -> dict:
    """The entry of a source nothing is known of: tokens_read is trained + masked + truncated + dropped.

    think_rows train a think block; texts are neither think nor no-think rows.
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
    """A row per source and one for the whole."""
    settings, totals = report["settings"], report["totals"]
    table = Table(title=", ".join(f"{key} {value}" for key, value in settings.items()), caption=caption(totals))
    table.add_column("source")
    for title in (
        "rows",
        "think / no",
        "tokens",
        "trained",
        "masked",
        "truncated",
        "split",
        "dropped",
        "p50 / p99 / max",
    ):
        table.add_column(title, justify="right")
    for name, entry in report["sources"].items():
        table.add_row(name, *cells(entry))
    table.add_section()
    table.add_row("all", *cells(totals))
    return table


def cells(entry: dict) -> list[str]:
    reasons = "\n".join(f"{count:,} {reason}" for reason, count in entry["dropped"].items())
    lengths = entry.get("length_percentiles", {})
    return [
        f"{entry['rows_kept']:,} of {entry['rows_read']:,}",
        f"{entry['think_rows']:,} / {entry['no_think_rows']:,}",
        f"{entry['tokens_read']:,}",
        f"{entry['tokens_trained']:,}",
        f"{entry['tokens_masked']:,}",
        f"{entry['rows_truncated']:,} rows, {entry['tokens_truncated']:,}",
        f"{entry['rows_split']:,}",
        reasons or "0",
        " / ".join(f"{lengths[key]:,}" for key in ("50", "99", "100") if key in lengths),
    ]


def caption(totals: dict) -> str:
    if "packs" in totals:
        return (
            f"{totals['packs']:,} packs of {totals['tokens_per_pack']:,.0f} tokens on average, "
            f"{totals['fill_percent']:.1f}% full"
        )
    return f"{totals['pairs']:,} pairs of {totals['tokens_per_pair']:,.0f} tokens on average"
