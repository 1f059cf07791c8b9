"""Which of the models that an OpenAI-compatible server lists under /models is the one that is meant."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def served_as(models: Sequence[dict[str, Any]], wanted: str | Path) -> dict[str, Any] | None:
    """The entry of a model, or None where the server has another one.

    Args:
        models: `data` of the server's answer: each with an `id`, and with a `root` where the id is only a name.
        wanted: Hub id, or folder of a checkpoint, wherever it is named from.
    """
    for model in models:
        for place in (model.get("root"), model["id"]):
            if place and Path(place).resolve() == Path(wanted).resolve():
                return model
    return None


def listed(models: Sequence[dict[str, Any]]) -> str:
    """The models for a message."""
    return ", ".join(model.get("root") or model["id"] for model in models) or "nothing"
