"""Which model a command means: a checkpoint folder, a stage of a pipeline, or a server."""

import re
from pathlib import Path
from typing import NamedTuple

from smolpost import schema
from smolpost.errors import UserError
from smolpost.files import MANIFEST
from smolpost.pipeline import manifest
from smolpost.screen import command_line, shown
from smolpost.stages.base import CHECKPOINT

CONFIG = "config.json"  # of a checkpoint folder


ADAPTER = "adapter_config.json"  # of a folder that holds a LoRA adapter


class UnknownModel(UserError):
    """No model has the name."""


class NamedModel(NamedTuple):
    """
    Attributes:
        name: For people: the stage's name with its seed, the folder or the URL.
        folder: Of the checkpoint, or None for a server.
        url: Of a server's OpenAI-compatible API, or None.
    """

    name: str
    folder: Path | None
    url: str | None = None


def model_named(text: str, words: list[str]) -> NamedModel:
    """The model that a word of the command line names.

    A stage is looked up in the pipeline that the words choose. Without a `pipeline=` word it is the newest finished
    one of that name under `run_dir`.

    Args:
        text: An http(s) URL, a checkpoint folder, a stage's name, or "checkpoint" for the start of the pipeline.
        words: key=value words, such as pipeline=tiny or run_dir=FOLDER.
    Raises:
        UserError: There is no such model, it is not finished, or several runs have one of that name.
    """
    if re.match("https?://", text):
        return NamedModel(text, None, text.rstrip("/"))
    folder = Path(text)
    if (folder / CONFIG).is_file():
        return NamedModel(text, folder)
    if (folder / ADAPTER).is_file():
        merge = command_line(["smolpost", "merge", "OUT", f"{text}=1"])
        raise UserError(f"{text} holds a LoRA adapter without its base model; `{merge}` writes the whole model to OUT")
    if folder.is_dir() or "/" in text:
        if folder.is_dir():
            what = f"has no {CONFIG}, so it is not a checkpoint"
        else:
            what = "is a file" if folder.is_file() else "does not exist"
        raise UserError(f"{text} {what}; name a checkpoint folder, a stage, or the URL of a server")
    if any(word.startswith("pipeline=") for word in words):
        return _planned(text, words)
    return NamedModel(text, _newest(text, words))


def finished_folder(text: str, words: list[str]) -> Path:
    """The folder of a finished stage of any kind, or of an adopted checkpoint.

    Args:
        text: The folder, or a stage's name, looked up as `model_named` does.
    Raises:
        UserError: There is no such folder or stage, it is not finished, or several runs have one of that name.
    """
    if Path(text).is_dir() or "/" in text:
        return Path(text)
    if not any(word.startswith("pipeline=") for word in words):
        return _newest(text, words, models_only=False)
    from smolpost import recipe
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one

    lineage = Lineage(recipe.load(words), look_up=True)
    stage = select_one(lineage.stages.planned.values(), text).name
    lineage.require(stage)
    return lineage.stages[stage].folder


def _planned(stage: str, words: list[str]) -> NamedModel:
    from smolpost import recipe
    from smolpost.pipeline import steps
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one

    lineage = Lineage(recipe.load(words), look_up=True)
    makers = [planned.name for planned in lineage.stages.planned.values() if planned.config.MAKES_MODEL]
    if stage == CHECKPOINT:
        if not lineage.recipe.model.checkpoint:
            raise UserError(
                f"{stage} stands for model.checkpoint, which has no value here; choose one of: {', '.join(makers)}"
            )
        return NamedModel(stage, steps.model_folder(lineage, stage))
    planned = select_one(lineage.stages.planned.values(), stage)
    if not planned.config.MAKES_MODEL:
        raise UserError(f"{stage} makes no model; choose one of: {', '.join(makers)}")
    return NamedModel(planned.name, steps.model_folder(lineage, planned.name))


def _newest(stage: str, words: list[str], models_only: bool = True) -> Path:
    given = [word.partition("=")[2] for word in words if word.startswith("run_dir=")]
    root = Path(given[-1] if given else schema.Recipe.run_dir)
    found: dict[str, list[tuple[str, Path]]] = {}  # pipeline -> (when finished, folder) of each result
    for file in root.glob(f"*/*/{MANIFEST}"):
        made = manifest.read(file.parent)
        if made and stage == made.get("stage") and (not models_only or (file.parent / CONFIG).is_file()):
            found.setdefault(file.parent.parent.name, []).append((made["finished"], file.parent))
    if not found:
        raise UnknownModel(
            f"{stage} is not a {'checkpoint ' if models_only else ''}folder, and no run under {shown(root)} has a "
            f"finished {'model' if models_only else 'stage'} of that name; name a folder, or a stage with "
            f"pipeline=NAME{', or the URL of a server' if models_only else ''}"
        )
    if len(found) > 1:
        choices = " or ".join(f"pipeline={name}" for name in sorted(found))
        raise UserError(f"{stage} is a stage of several runs under {shown(root)}; add {choices}")
    [results] = found.values()
    return max(results)[1]
