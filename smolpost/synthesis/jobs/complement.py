"""Which sources of a mixture have rows of a mode already, so that only the others are filled."""

from collections.abc import Iterable
from typing import Any

from smolpost.data.prompts import mode_of


def sources_of_mode(rows: Iterable[tuple[str, dict[str, Any]]], thinking: bool, suffix: str) -> set[str]:
    """Names of the sources with at least one row of the mode, with and without the suffix that jobs add.

    Args:
        rows: (name in the mixture, row).
    """
    mode = "think" if thinking else "no_think"
    found = {str(row.get("source") or name) for name, row in rows if mode_of(row) == mode}
    return found | {name.removesuffix(suffix) for name in found if suffix}
