"""What a task left on the disk."""

import json
from pathlib import Path
from typing import Any

SAMPLES = "samples.jsonl"  # grows by whole batches
SCORES = "scores.json"  # written last: a folder without it is unfinished


def read(folder: Path) -> dict[str, Any] | None:
    """What `run.run_task` returned, or None where the task is unfinished."""
    file = folder / SCORES
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def samples(folder: Path) -> list[dict[str, Any]]:
    """Every sample that a finished task measured, without its record: prompts may be long."""
    with open(folder / SAMPLES, encoding="utf-8") as file:
        return [{key: value for key, value in json.loads(line).items() if key != "record"} for line in file]
