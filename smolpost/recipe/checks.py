"""Do the parts of a recipe fit together, and can every value be meant?"""

import dataclasses
import math
import re
from pathlib import Path

from smolpost import schema
from smolpost.data import row_shapes  # noqa: F401 - registers them
from smolpost.objectives.losses import configured
from smolpost.recipe.written import Written, Wrong, near, text
from smolpost.registry import LOSSES

STAGE = "a stage of this pipeline"
NAME = re.compile(r"\w[\w.+-]*")  # of a folder or file under run_dir


def check(recipe: schema.Recipe, written: Written) -> None:
    """Refuse a recipe whose values cannot mean anything.

    Args:
        written: Where each key was written, to say where the parts of a wrong sum come from.

    Raises:
        Wrong: With the full key, the value, and what would do.
    """
    _check_names(recipe)
    _check_values(recipe, "")
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


def _check_names(recipe: schema.Recipe) -> None:
    """Names that become folders and files: none leads out of run_dir."""
    named = {"stages": recipe.stages, "data": recipe.data, "evaluation.tasks": recipe.evaluation.tasks}
    named |= {f"data.{name}.sources": mixture.sources for name, mixture in recipe.data.items()}
    for stage, config in recipe.stages.items():
        if isinstance(config, schema.TasksStage):
            named[f"stages.{stage}.files"] = config.files
    for key, name in [("pipeline", recipe.pipeline), *((k, name) for k, names in named.items() for name in names)]:
        if not NAME.fullmatch(name):
            what = "=" if key == "pipeline" else " has the name "
            raise Wrong(
                key, f"{what}{name}, which becomes a folder or file; use letters, digits and _ . + - after the first"
            )


def _check_values(node: object, prefix: str) -> None:
    """Choices, intervals and lists of every field that states them in the schema; numbers are finite everywhere."""
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
        _check_values(value, f"{key}.")
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


def _check_stage(key: str, stage: schema.Stage, recipe: schema.Recipe, written: Written) -> None:
    if isinstance(stage, schema.TrainStage):
        _check_training(key, stage, written)
    if isinstance(stage, schema.MergeStage):
        _check_merge(key, stage, written)
    if isinstance(stage, schema.MergekitStage):
        _check_mergekit(key, stage)
    if isinstance(stage, schema.ChoosingStage):
        _check_choosing(key, stage, recipe)
    for name, parent in stage.parents():
        if parent == "checkpoint" and not recipe.model.checkpoint:
            what = "=checkpoint, but model.checkpoint has no value; give it as model.checkpoint=ID"
            raise Wrong(f"{key}.{name}", what)
        _check_reference(f"{key}.{name}", parent, [*recipe.stages, "checkpoint"], STAGE)
    for name, mixture in stage.mixtures():
        _check_reference(f"{key}.{name}", mixture, recipe.data, "a mixture under data")


def _check_reference(key: str, name: str, known, what: str) -> None:
    if name not in known:
        hint = f"{near('', name, known)}choose one of: {', '.join(known) or '(none)'}"
        raise Wrong(key, f"={name} is not {what}; {hint}")


def _check_merge(key: str, stage: schema.MergeStage, written: Written) -> None:
    total = sum(stage.inputs.values())
    if abs(total - 1) > 1e-6:
        parts = [
            f"{name} {weight:g} ({written.place(f'{key}.inputs.{name}')})" for name, weight in stage.inputs.items()
        ]
        last = list(stage.inputs)[-1] if parts else "NAME"
        raise Wrong(
            f"{key}.inputs",
            f" sum to {total:g}, and weights of a linear merge sum to 1: {', '.join(parts) or '(none)'}; change one as "
            f"{key}.inputs.{last}=WEIGHT, or leave it out with ~{key}.inputs.{last}",
        )
    _check_reference(f"{key}.base", stage.base, stage.inputs, "an input of the stage")


def _check_mergekit(key: str, stage: schema.MergekitStage) -> None:
    if (stage.method is None) == (stage.config is None):
        raise Wrong(key, " needs a method of mergekit's or a config, its YAML file; give one of them")
    if stage.config and (stage.parameters or stage.base_model or any(stage.inputs.values())):
        raise Wrong(
            f"{key}.config",
            f"={stage.config} states parameters and base_model itself; give the inputs' names alone, as {{NAME: {{}}}}",
        )
    if stage.config and not Path(stage.config).is_file():
        raise Wrong(f"{key}.config", f"={stage.config} is not a file; name a mergekit YAML")
    _check_reference(f"{key}.base", stage.base, stage.inputs, "an input of the stage")


def _check_choosing(key: str, stage: schema.ChoosingStage, recipe: schema.Recipe) -> None:
    inputs = list(dict.fromkeys(parent for _, parent in stage.parents()))
    _check_reference(f"{key}.base", stage.base, inputs, "an input of the stage")
    for name, metric in stage.metrics_used():
        task, slash, _ = metric.removeprefix("-").partition("/")
        if not slash or task not in recipe.evaluation.tasks:
            raise Wrong(
                f"{key}.{name}",
                f"={metric} is not TASK/METRIC with a task of evaluation.tasks; tasks: "
                f"{', '.join(recipe.evaluation.tasks) or '(none)'}; or leave the stage out with ~{key}",
            )


def _check_task(key: str, task: schema.EvaluationTask, recipe: schema.Recipe) -> None:
    for name, mixture in task.mixtures():
        _check_reference(f"{key}.{name}", mixture, recipe.data, "a mixture under data")
    for name, path in task.files():
        if not Path(path).is_file():
            raise Wrong(f"{key}.{name}", f"={path} is not a file; name one, or leave the task out with ~{key}")
    models = [name for name, stage in recipe.stages.items() if stage.kind in schema.MODEL_KINDS]
    for stage in task.stages or []:
        _check_reference(f"{key}.stages", stage, models, "a stage of this pipeline with a model")


def _check_training(key: str, stage: schema.TrainStage, written: Written) -> None:
    if stage.lora.r and stage.snapshot_steps:
        raise Wrong(
            f"{key}.snapshot_steps",
            f"={stage.snapshot_steps} keeps whole weights, and {key}.lora.r={stage.lora.r} trains adapters; set one of "
            "them to null or 0",
        )
    if isinstance(stage, schema.APOStage):
        _check_preference(key, stage, written)


def _check_preference(key: str, stage: schema.APOStage, written: Written) -> None:
    written.check_settings(f"{key}.loss_settings", stage.loss_settings, LOSSES[stage.loss], f"loss={stage.loss}")
    _check_values(configured(stage.loss, stage.loss_settings), f"{key}.loss_settings.")
    if stage.overlong == "split":
        raise Wrong(f"{key}.overlong", "=split cannot be done to a pair; choose one of: refuse, truncate, drop")
