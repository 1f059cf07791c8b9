"""Outcomes in the terminal: the prompt, the replies side by side, their tokens and what the filters said."""

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from smolpost.progress import plural
from smolpost.report.samples import Samples, Shown, Turn
from smolpost.report.terminal import visible_character
from smolpost.screen import Blocks

CLIPPED = 1200  # characters of a text in the terminal
SIDE_WIDTH = 40  # columns that a side needs beside another one


def show_samples(
    samples: Samples, console: Console, *, limit: int = 1, source: str | None = None, identity: str | None = None
) -> None:
    """Print the counts by source, then outcomes.

    Raises:
        UserError: As `Samples.choose`.
    """
    found, total = samples.choose(limit, source, identity)
    report = samples.report
    print_line(console, f"{samples.folder}  {report['facts']['kind']}")
    console.print(counts_table(report))
    for one in found:
        show(one, console)
    print_line(console, f"shown {len(found):,} of {total:,} {plural('prompt', total)}; --html FILE shows whole texts")


def counts_table(report: Mapping) -> Blocks:
    """Prompts by source and by what became of them."""
    reasons, lines = list(report["filtered"]), count_lines(report)
    rows = [
        [
            plain(name), f"{entry['prompts']:,}", f"{entry['accepted']:,}",
            f"{entry['accepted'] / entry['prompts']:.1%}",
            *(f"{entry['filtered'].get(reason, 0):,}" for reason in reasons), f"{entry['failed']:,}",
        ]
        for name, entry in lines
    ]  # fmt: skip
    heads = ["source", "prompts", "accepted", "share", *reasons, "failed"]
    return Blocks(heads, rows, last_is_sum=len(lines) > 1)


def count_lines(report: Mapping) -> list[tuple[str, Mapping]]:
    """(source, its counts), and of several sources those of all at the end."""
    lines = list(report["sources"].items())
    return [*lines, ("all", report)] if len(lines) > 1 else lines


def length_lines(report: Mapping) -> list[str]:
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
            f"pairs: chosen about {pairs['chosen']:,.1f} tokens, rejected about {pairs['rejected']:,.1f}; chosen is "
            f"longer in {pairs['chosen_longer']:.0%}"
        )
    if answers := report["answers"]:
        lines.append(f"answers: {answers['right']:.1%} of {answers['labelled']:,} are right")
    return lines


def show(one: Shown, console: Console) -> None:
    """Print one outcome."""
    console.print()
    why = one.error or one.reason
    print_line(console, f"══ {one.id}  {one.source}  {one.status}{f': {why}' if why else ''}")
    for turn in one.prompt:
        console.print(_turn(turn), soft_wrap=False)
    if len(one.sides) * SIDE_WIDTH <= console.width and len(one.sides) > 1:
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=True)
        for name in one.sides:
            table.add_column(Text(plain(name)), ratio=1, overflow="fold")
        table.add_row(*(Text("\n").join(map(_turn, turns)) for turns in one.sides.values()))
        console.print(table)
    else:
        for name, turns in one.sides.items():
            print_line(console, f"── {name}")
            for turn in turns:
                console.print(_turn(turn))
    if one.tokens:
        print_line(console, "tokens: " + ", ".join(f"{role} {number:,}" for role, number in one.tokens.items()))
    if one.verdicts:
        print_line(console, "filters: " + ", ".join(map(verdict_text, one.verdicts)))


def verdict_text(verdict: Mapping) -> str:
    """A verdict in a few words: finished ok, repetition ok 0.25, answer FAULT wrong_answer 0."""
    score = "" if verdict["score"] is None else f" {verdict['score']:.3g}"
    return f"{verdict['filter']} {'ok' if verdict['passed'] else 'FAULT ' + verdict['reason']}{score}"


def plain(text: str) -> str:
    """The text with what steers a terminal or turns the direction of writing as codes."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else visible_character(c) for c in text)


def _turn(turn: Turn) -> Text:
    text = Text()
    if turn.role != "assistant":
        text.append(f"{turn.role}: ", style="bold")
    if turn.reasoning is not None:
        text.append(f"think: {_clipped(turn.reasoning)}\n", style="dim").append("answer: ")
    text.append(_clipped(turn.text))
    for call in turn.calls:
        text.append(f"\ncalls {_clipped(call)}")
    return text


def _clipped(text: str) -> str:
    text = text.strip("\n")
    if len(text) <= CLIPPED:
        return plain(text)
    half = CLIPPED // 2
    return f"{plain(text[:half])} [... {len(text) - 2 * half:,} more characters ...] {plain(text[-half:])}"


def print_line(console: Console, text: str) -> None:
    console.print(Text(plain(text)), soft_wrap=True)
