"""One door to all harnesses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolpost.errors import UserError
from smolpost.evaluation.harness import lighteval, lm_eval
from smolpost.evaluation.harness.store import settings_key
from smolpost.evaluation.task import MODES
from smolpost.schema import Harness

VERSION = 1  # of what we make of a harness's scores
KINDS = {"lm_eval": lm_eval, "lighteval": lighteval}


def run_harness(harness: Harness, checkpoint: Path, out: Path, log: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Measure a checkpoint with another harness, one call per task and mode.

    Args:
        harness: Which one, and what it asks.
        checkpoint: Folder of the model.
        out: Folder of this model and these settings. A task and mode that finished here with the same settings,
            harness version, task files, weights and tokenizer is read, not run; nothing else of an earlier run is used.
        log: Told a line per task and mode.
    Returns:
        Task name -> "kind", "scores" (metric -> value, n, low, high), "notes", "num_items", "seconds", as our own tasks
        give them. A mode's headline is called by the mode, its other metrics MODE/METRIC.
    Raises:
        UserError: A setting, a task or the harness's installation cannot be used, or a run fails.
    """
    if harness.kind == "none":
        return {}
    _check(harness)
    return KINDS[harness.kind].run(harness, checkpoint, out, log)


def harness_key(harness: Harness) -> str | None:
    """Names all that decides scores but the model: settings, the harness's version and the user's task files.

    Raises:
        UserError: The harness is not installed.
    """
    return None if harness.kind == "none" else settings_key(harness, KINDS[harness.kind].version(harness))


def _check(harness: Harness) -> None:
    if not harness.tasks:
        raise UserError(f"harness.tasks is empty; name {harness.kind} tasks, e.g. tasks=gsm8k,ifeval")
    strange = [mode for mode in harness.modes if mode not in MODES]
    if strange or not harness.modes:
        raise UserError(f"harness.modes={harness.modes} may hold only {' and '.join(MODES)}, and at least one")
    if harness.limit is not None and harness.limit < 1:
        raise UserError(f"harness.limit={harness.limit} is not a number of rows; give 1 or more, or null for all")
