"""Which sources of a mixture have rows of a mode already, so that only the others are filled."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from smolpost.data.prompts import mode_of
from smolpost.synthesis.jobs.prompts import prompts_of
from smolpost.synthesis.records import Prompt


class Complement:
    """The prompts of the other sources, in the order of the rows.

    Args:
        rows: (name in the mixture, row).
        complete: Sources that are left out.
    """

    def __init__(self, rows: Iterable[tuple[str, dict[str, Any]]], complete: Collection[str] = ()):
        self.rows, self.complete = rows, frozenset(complete)
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Prompt]:
        self.left_out.clear()
        for prompt in prompts_of(self.rows):
            if prompt.source in self.complete:
                self.left_out[prompt.source] += 1
            else:
                yield prompt

    def report(self) -> dict[str, Any]:
        """Number of prompts of each source that was left out."""
        return {"sources_left_out": dict(self.left_out)} if self.complete else {}

    def lines(self) -> list[str]:
        """The same in words."""
        found = ", ".join(f"{source} ({number:,} prompts)" for source, number in self.left_out.items())
        return [f"sources left out, as they have rows of this mode: {found or 'none'}"] if self.complete else []


def sources_of_mode(rows: Iterable[tuple[str, dict[str, Any]]], thinking: bool, suffix: str) -> set[str]:
    """Names of the sources with at least one row of the mode, with and without the suffix that jobs add.

    Args:
        rows: (name in the mixture, row).
    """
    mode = "think" if thinking else "no_think"
    found = {str(row.get("source") or name) for name, row in rows if mode_of(row) == mode}
    return found | {name.removesuffix(suffix) for name in found if suffix}
