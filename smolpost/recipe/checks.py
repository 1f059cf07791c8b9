"""Checks of a typed recipe: its parts fit together, and every value makes sense."""

import dataclasses
import math
import re
from pathlib import Path

from smolpost import schema
from smolpost.errors import Wrong
from smolpost.evaluation.task import EvaluationTask
from smolpost.recipe.written import Written, near, text
from smolpost.stages.base import CHECKPOINT, Stage

STAGE = "a stage of this pipeline"
NAME = re.compile(r"\w[\w.+-]*")  # of a folder or file under run_dir


def check(recipe: schema.Recipe, written: Written) -> None:
    """Refuse a recipe with values that make no sense.

    Args:
        written: Where each key was written, to say where the parts of a wrong sum come from.

    Raises:
        Wrong: With the full key, the value, and what would do.
    """
    _check_names(recipe)
    check_values(recipe, "")
    processes = recipe.accelerate.get("num_processes", 1)
    if type(processes) is not int or processes < 1:
        raise Wrong("accelerate.num_processes", f"={processes!r} is not a whole number above 0; write 1 or more")
    if recipe.harness.tasks and recipe.harness.kind == "none":
        tasks = ",".join(recipe.harness.tasks)
        raise Wrong("harness.tasks", f"={tasks} needs a harness; add harness=lm_eval or harness=lighteval")
    for name, stage in recipe.stages.items():
        _check_stage(f"stages.{name}", stage, recipe, written)
    for name, task in recipe.evaluation.tasks.items():
        _check_task(f"evaluation.tasks.{name}", task, recipe)
    for mixture, rows in recipe.data.items():
        if not rows.sources:
            raise Wrong(f"data.{mixture}", f" has no sources; add one: +data.{mixture}.sources.NAME.path=FILE")
        for source, spec in rows.sources.items():
            if spec.stage is not None:
                _check_reference(f"data.{mixture}.sources.{source}.stage", spec.stage, recipe.stages, STAGE)
            if spec.mode_from_reply and spec.enable_thinking is not None:
                mode = str(spec.enable_thinking).lower()
                raise Wrong(
                    f"data.{mixture}.sources.{source}.mode_from_reply",
                    f"=true stands in place of enable_thinking={mode}; leave one of them out",
                )


def _check_names(recipe: schema.Recipe) -> None:
    """Names that become folders and files must not lead out of run_dir."""
    named = {"stages": recipe.stages, "data": recipe.data, "evaluation.tasks": recipe.evaluation.tasks}
    named |= {f"data.{name}.sources": mixture.sources for name, mixture in recipe.data.items()}
    for stage, config in recipe.stages.items():
        named |= {f"stages.{stage}.{key}": names for key, names in config.folder_names().items()}
    for key, name in [("pipeline", recipe.pipeline), *((k, name) for k, names in named.items() for name in names)]:
        if not NAME.fullmatch(name):
            what = "=" if key == "pipeline" else " has the name "
            raise Wrong(
                key, f"{what}{name}, which becomes a folder or file; use letters, digits and _ . + - after the first"
            )


def check_values(node: object, prefix: str) -> None:
    """Check the choices, intervals and lists that fields state; every number must be finite."""
    for f in dataclasses.fields(node):
        key, value = f"{prefix}{f.name}", getattr(node, f.name)
        options = f.metadata.get("choices")
        if options and value not in options:
            raise Wrong(key, f"={value} is not a choice; choose one of: {', '.join(options)}")
        if f.metadata.get("filled") and not value:
            raise Wrong(key, "=[] is empty; name one at least")
        if f.metadata.get("distinct") and len(set(value)) != len(value):
            raise Wrong(key, f"={text(value)} has a value twice; name each once")
        _check_items(key, value, f.metadata.get("interval"))


def _check_items(key: str, value: object, interval: str | None) -> None:
    if dataclasses.is_dataclass(value):
        check_values(value, f"{key}.")
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_items(f"{key}.{name}", item, interval)
    elif isinstance(value, list):
        for item in value:
            _check_items(key, item, interval)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Wrong(key, f"={value} is not a finite number")
    elif interval and value is not None:
        _check_interval(key, value, interval)


def _check_interval(key: str, value: float, interval: str) -> None:
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = (low <= value if interval[0] == "[" else low < value) and (
        value <= high if interval[-1] == "]" else value < high
    )
    if inside:
        return
    if high < math.inf:
        raise Wrong(key, f"={text(value)} is outside {interval}")
    raise Wrong(
        key, f"={text(value)} " + (f"is below {low:g}, its least value" if interval[0] == "[" else "must be above 0")
    )


def _check_stage(key: str, stage: Stage, recipe: schema.Recipe, written: Written) -> None:
    for name, settings, kind, of in stage.nested_settings():
        written.check_settings(f"{key}.{name}", settings, kind, of)
        check_values(kind(**settings), f"{key}.{name}.")
    stage.check(key, recipe, written.place)
    for name, parent in stage.parents():
        if parent == CHECKPOINT and not recipe.model.checkpoint:
            what = "=checkpoint, but model.checkpoint has no value; give it as model.checkpoint=ID"
            raise Wrong(f"{key}.{name}", what)
        _check_reference(f"{key}.{name}", parent, [*recipe.stages, CHECKPOINT], STAGE)
    for name, mixture in stage.mixtures():
        _check_reference(f"{key}.{name}", mixture, recipe.data, "a mixture under data")


def _check_reference(key: str, name: str, known, what: str) -> None:
    if name not in known:
        hint = f"{near('', name, known)}choose one of: {', '.join(known) or '(none)'}"
        raise Wrong(key, f"={name} is not {what}; {hint}")


def _check_task(key: str, task: EvaluationTask, recipe: schema.Recipe) -> None:
    for name, mixture in task.mixtures():
        _check_reference(f"{key}.{name}", mixture, recipe.data, "a mixture under data")
    for name, path in task.files():
        if not Path(path).is_file():
            raise Wrong(f"{key}.{name}", f"={path} is not a file; name one, or leave the task out with ~{key}")
    models = [name for name, stage in recipe.stages.items() if stage.MAKES_MODEL]
    for stage in task.stages or []:
        _check_reference(f"{key}.stages", stage, models, "a stage of this pipeline with a model")
