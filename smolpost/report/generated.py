"""What a stage of synthetic data has made of its prompts, for the terminal."""

from collections.abc import Mapping
from typing import Any

from smolpost.screen import Blocks


def counts_table(report: Mapping[str, Any]) -> Blocks:
    """Prompts of each source by what became of them; a column for each reason.

    Args:
        report: Of `synthesis.results.write`.
    """
    reasons = list(report["filtered"])
    heads = ["source", "prompts", "rows", "share", *(f"filtered\n{reason}" for reason in reasons), "failed"]
    rows = [_line(name, found, reasons) for name, found in report["sources"].items()]
    if len(rows) > 1:
        rows.append(_line("all", report, reasons))
    return Blocks(heads, rows, last_is_sum=len(rows) > 1)


def _line(name: str, found: Mapping[str, Any], reasons: list[str]) -> list[str]:
    counts = [found["filtered"].get(reason, 0) for reason in reasons]
    share = found["accepted"] / max(1, found["prompts"])
    return [name, f"{found['prompts']:,}", f"{found['accepted']:,}", f"{share:.1%}",
            *(f"{count:,}" for count in counts), f"{found['failed']:,}"]  # fmt: skip


def length_lines(report: Mapping[str, Any]) -> list[str]:
    """Mean lengths of what became a row and of what did not, by role; of pairs, those of both sides.

    Args:
        report: `synthesis.tally.Tally.report`.
    """
    lines = []
    for role, found in report["replies"].items():
        parts = [
            f"{name} {found[name]['mean']:,.0f} ({found[name]['count']:,} replies)"
            for name in ("accepted", "dropped")
            if found[name]["count"]
        ]
        if parts:
            lines.append(f"{role}: mean tokens {', '.join(parts)}; {found['cut']:.1%} cut")
    if pairs := report["pairs"]:
        lines.append(
            f"pairs: chosen about {pairs['chosen']:,.0f} tokens, rejected about {pairs['rejected']:,.0f}; chosen is "
            f"longer in {pairs['chosen_longer']:.0%}"
        )
    if answers := report["answers"]:
        lines.append(f"answers: {answers['right']:.1%} of {answers['labelled']:,} are right")
    return lines
