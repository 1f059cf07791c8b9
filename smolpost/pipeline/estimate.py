"""How long the rest of a run will take, from what the same stages took before."""

import json
from pathlib import Path

from smolpost.evaluation import results
from smolpost.pipeline import manifest
from smolpost.pipeline.lineage import Located

STARTING = 5.0  # seconds until a command has loaded its libraries; more than a miniature's stage takes, often


def finished_before(stage: Located) -> list[dict]:
    """Manifests of finished folders of the recipe's stage with any seed and key, the newest last."""
    name = stage.entry
    found = [manifest.read(folder) for folder in stage.folder.parent.glob(f"{name}-*") if folder.is_dir()]
    return sorted(
        (m for m in found if m and m.get("stage") in (name, f"{name}-{m.get('seed')}")), key=lambda m: m["finished"]
    )


def as_stored(stage: Located) -> dict:
    """A stage's settings as its manifest has them."""
    return json.loads(json.dumps(stage.shown))


def seconds_left(todo: list[tuple[Located, str]], finished: set[str], elapsed: float) -> float | None:
    """Seconds that the stages of a run still need; None unless all of them have been made before.

    The pace of the stages that this run has finished (another machine, preparation) is taken to go on.

    Args:
        todo: Every stage that was not done when the run began, with the word for what it lacked, as by `run.status`.
        finished: Names of those that this run has finished.
        elapsed: Seconds since it began.
    """
    seconds = {stage.name: _seconds(stage, word) for stage, word in todo}
    rest = [spent for name, spent in seconds.items() if name not in finished]
    made = sum(seconds[name] or 0.0 for name in finished & seconds.keys())
    if not rest or None in rest:
        return None
    return sum(rest) * (elapsed / made if made else 1.0)


def seconds_after(stage: Located, todo: list[tuple[Located, str]], finished: set[str], elapsed: float) -> float | None:
    """Seconds that a run needs once the stage is made: for its own evaluation and for the other stages; None: unknown.

    The arguments are those of `seconds_left`.
    """
    measuring = _seconds(stage, "evaluate") if stage.measuring else 0.0
    others = [(other, word) for other, word in todo if other.name != stage.name]
    if all(other.name in finished for other, _ in others):
        return measuring
    left = seconds_left(others, finished, elapsed)
    return None if left is None or measuring is None else left + measuring


def _seconds(stage: Located, word: str) -> float | None:
    """Seconds that the stage's commands last took for as much work, with its own seed if possible; None: never."""
    same = [m for m in finished_before(stage) if _work(m["config"]) == _work(as_stored(stage))]
    found = [m for m in same if m["stage"] == stage.name] or same
    if not found:
        return None
    last = found[-1]
    making = 0.0 if word == "evaluate" else last["seconds"] + STARTING * len(stage.making)
    measuring = _measuring(stage.folder.parent / "evaluations" / f"{last['stage']}-{last['key']}")
    return making + (measuring + STARTING if measuring else 0.0)


def _work(config: dict) -> dict:
    """The settings that decide how much there is to do: counts, sizes, switches and lists, whatever the seed."""
    return {
        key: value
        for key, value in config.items()
        if key == "num_epochs" or (isinstance(value, int | list) and not key.startswith("seed"))
    }


def _measuring(folder: Path) -> float:
    tasks = [results.read(task) for task in folder.iterdir() if task.is_dir()] if folder.is_dir() else []
    return sum(task["seconds"] for task in tasks if task)
