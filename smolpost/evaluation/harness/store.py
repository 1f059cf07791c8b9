"""What each benchmark left on the disk, one folder per task and mode, and the scores joined from them."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from smolpost.errors import UserError
from smolpost.evaluation.results import SAMPLES, SCORES, read
from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Sample
from smolpost.files import digest, sha256, write_json
from smolpost.schema import Harness

PLAIN = "plain"  # the one mode without a chat template
OUR_METRICS = ("cut", "unclosed")  # shares of replies that reached the longest length, that ended inside a think block
_OF_MODEL = ("*.safetensors", "*.json", "*.jinja")  # weights, config, tokenizer and template
_OF_SELECTION = ("tasks", "modes", "headline")  # say which units there are and how they are shown, not what one holds


def modes_of(harness: Harness) -> list[str]:
    """The modes that every task is asked in."""
    return list(harness.modes) if harness.apply_chat_template else [PLAIN]


def settings_key(harness: Harness, version: str) -> str:
    """16 hex digits of all that decides a unit's scores but the model, the task and the mode.

    Args:
        version: Of the installed harness.
    """
    settings = {
        field.name: getattr(harness, field.name)
        for field in dataclasses.fields(harness)
        if field.metadata.get("in_key", True) and field.name not in _OF_SELECTION
    }
    return digest({"settings": settings, "version": version, "files": _task_files(harness.custom_tasks)}, digits=16)


def unit_key(settings: str, checkpoint: Path) -> str:
    """16 hex digits of the settings and of the content of the checkpoint's files.

    Content, as a folder's path and name say nothing: weights that were overwritten in place are another model.

    Raises:
        UserError: The folder holds no weights.
    """
    files = sorted({file for pattern in _OF_MODEL for file in checkpoint.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"{checkpoint} is not a checkpoint: it has no *.safetensors; save it with save_pretrained")
    return digest({"settings": settings, "model": {file.name: sha256(file) for file in files}}, digits=16)


def finished(folder: Path, key: str) -> dict[str, Any] | None:
    """A unit's result, if it was made under this key."""
    unit = read(folder)
    return unit if unit and unit["key"] == key else None


def folder_of(out: Path, task: str, mode: str) -> Path:
    """Where a task's mode is kept; any task's name makes a folder's name."""
    return out / quote(task, safe="") / mode


def write_unit(part: Path, unit: dict[str, Any], samples: Iterable[dict[str, Any]]) -> None:
    """Keep a unit: the samples first, the scores last."""
    with open(part / SAMPLES, "w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample, ensure_ascii=False, default=str) + "\n")
    write_json(part / SCORES, unit)


def score(value: float, n: int, stderr: Any = None) -> dict[str, float | int | None]:
    """A metric in our form.

    Args:
        stderr: The harness's own standard error; the normal distribution's 95% interval is made of it. Anything but a
            finite number: there is no interval.
    """
    half = 1.96 * stderr if isinstance(stderr, int | float) and math.isfinite(stderr) else None
    low, high = (None, None) if half is None else (value - half, value + half)
    return {"value": float(value), "low": low, "high": high, "n": n}


def with_samples(scores: dict[str, dict[str, Any]], samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Our own intervals for the harness's scores, and our own metrics after them.

    Our bootstrap needs no normal distribution, so its ends stay in a metric's range. It fits where the harness's value
    is the plain mean over all samples; elsewhere the interval stays what the harness's standard error gives.
    """
    numbers = [
        Sample(s["id"], {name: float(v) for name, v in s["metrics"].items() if isinstance(v, int | float)})
        for s in samples
    ]
    merged = dict(scores)
    for name, own in aggregate(numbers).items():
        theirs = scores.get(name)
        if theirs is None:
            merged |= {name: own} if name in OUR_METRICS else {}
        elif own["n"] == theirs["n"] and math.isclose(own["value"], theirs["value"], abs_tol=1e-9):
            merged[name] = own
    return merged


def skipped(reason: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result, and no samples, of a mode that makes no sense for a task."""
    return {"scores": {}, "num_items": 0, "seconds": 0.0, "notes": {"skipped": reason}}, []


def joined(kind: str, task: str, units: dict[str, dict[str, Any]], headline: str | None) -> dict[str, Any]:
    """One task's modes in the form of our own tasks' results.

    Args:
        units: Mode -> {"scores", "num_items", "seconds", "notes"}.
        headline: Metric that stands for a mode; None: the harness's first.
    Raises:
        UserError: The task has no such metric.
    """
    scores: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for mode, unit in units.items():
        metrics = unit["scores"]
        if headline is not None and metrics and headline not in metrics:
            known = ", ".join(metrics)
            raise UserError(f"harness.headline.{task}={headline} is not a metric of this task; it has {known}")
        if metrics:
            scores[mode] = metrics[headline or next(iter(metrics))]
        details |= {f"{mode}/{name}": metric for name, metric in metrics.items()}
    return {
        "kind": kind,
        "scores": scores | details,
        "notes": {mode: unit["notes"] for mode, unit in units.items()},
        "num_items": sum(unit["num_items"] for unit in units.values()),
        "seconds": round(sum(unit["seconds"] for unit in units.values()), 2),
    }


def summary(task: str, mode: str, unit: dict[str, Any]) -> str:
    """A line for the log."""
    if "skipped" in unit["notes"]:
        return f"{task} {mode}: skipped, {unit['notes']['skipped']}"
    name, first = next(iter(unit["scores"].items()))
    return f"{task} {mode}: {name}={first['value']:.4f} (n={first['n']})"


def _task_files(custom_tasks: str | None) -> dict[str, str]:
    """Content of the user's task files, and of the data files that they name; none for a Python module."""
    if custom_tasks is None or not Path(custom_tasks).exists():
        return {}
    root = Path(custom_tasks)
    files = {file for file in (root.rglob("*") if root.is_dir() else [root]) if file.is_file()}
    files = {file for file in files if "__pycache__" not in file.parts}
    for file in [f for f in files if f.suffix in (".yaml", ".yml", ".py")]:
        words = re.findall(r"[^\s'\"\[\]{},]+", file.read_text(encoding="utf-8", errors="replace"))
        files |= {Path(word) for word in words if len(word) < 1024 and Path(word).is_file()}
    return {str(file): sha256(file) for file in sorted(files)}
