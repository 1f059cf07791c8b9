"""YAML and command-line overrides in, one typed Recipe out. The only importer of hydra and omegaconf."""

import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from smolpost import schema
from smolpost.errors import UserError

GROUPS = ("model", "data", "evaluation", "harness", "accelerate")  # that a command line chooses from beside `pipeline`
# Whose entries have names of the user's choice: `+data.NAME=...` adds one, or to one, typed as in a file.
NAMED = ("data", "stages", "evaluation.tasks")
ROOMS = ("recipes", "data_gen", "merge")  # folders that stand beside the library in a clone and inside it in a wheel


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        recipe: The whole pipeline, typed.
        stage: The one stage meant, or None for all; not a part of the recipe, so it changes no cache key.
        overrides: The command line's `key=value` words without `stage=`, to be repeated by the stages' commands.
        accelerate: Name of the accelerate config under recipes/accelerate.
        launch_flags: Values of it that the command line changed, e.g. {"num_processes": 2}.
    """

    recipe: schema.Recipe
    stage: str | None
    overrides: tuple[str, ...]
    accelerate: str
    launch_flags: dict


def room(name: str) -> Path:
    """The folder `name` of ROOMS: beside the library in a clone, inside it in an installed wheel."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else Path(__file__).parent.parent / name


def load(words: list[str]) -> Request:
    """Compose the recipe that the command line's `key=value` words describe.

    `stage=` is not a part of it, and `tasks=A,B` is short for the harness's tasks in place of its own list.

    Raises:
        UserError: A word is no `key=value`, a group, key or value does not exist or has the wrong type, or the parts
            of the recipe do not fit together.
    """
    stage = None
    overrides = []
    for word in words:
        if word.startswith("stage="):
            stage = word.removeprefix("stage=")
        elif word.startswith("tasks="):
            overrides.append(f"harness.tasks=[{word.removeprefix('tasks=')}]")
        else:
            overrides.append(word)
    store = ConfigStore.instance()
    store.store(name="recipe_schema", node=schema.Recipe)
    for kind, node in (schema.STAGE_KINDS | schema.TASK_KINDS).items():
        store.store(group="schema", name=kind, node=node)
    config, accelerate = _compose(overrides)
    recipe = _typed(config)
    asked = recipe.harness.tasks
    recipe.harness.headline = {task: metric for task, metric in recipe.harness.headline.items() if task in asked}
    check(recipe)
    file_values = OmegaConf.to_container(OmegaConf.load(room("recipes") / "accelerate" / f"{accelerate}.yaml"))
    launch_flags = {k: v for k, v in recipe.accelerate.items() if file_values.get(k) != v}
    return Request(recipe, stage, tuple(overrides), accelerate, launch_flags)


def _compose(overrides: list[str]) -> tuple[DictConfig, str]:
    GlobalHydra.instance().clear()
    try:
        others, added = _split(overrides)
        with initialize_config_dir(str(room("recipes").resolve()), version_base="1.3"):
            config = compose("config", overrides=others, return_hydra_config=True)
        config = _with_added(config, added)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error, overrides)) from None
    accelerate = config.hydra.runtime.choices.get("accelerate")
    with open_dict(config):
        del config["hydra"]
    if accelerate is None:
        raise UserError(f"pipeline {config.pipeline} chooses no accelerate config; add `/accelerate: single` to it")
    return config, accelerate


def _split(overrides: list[str]) -> tuple[list[str], list[Override]]:
    """The words for Hydra, and those about entries of NAMED that a word with `+` adds or adds to."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    for word in parsed:
        if word.is_sweep_override():  # several values for one key, which Hydra has for --multirun
            raise UserError(_unreadable(word.input_line))
    touched = {_entry(word) for word in parsed if word.is_add() or word.is_force_add()} - {None}
    added = [word for word in parsed if _entry(word) in touched and not word.is_delete()]
    return [word.input_line for word in parsed if word not in added], added


def _entry(word: Override) -> str | None:
    """The entry of NAMED that a word is about, such as data.NAME."""
    for parent in NAMED if word.package is None else ():
        if word.key_or_group.startswith(f"{parent}."):
            return f"{parent}.{word.key_or_group.removeprefix(f'{parent}.').split('.')[0]}"
    return None


def _with_added(config: DictConfig, added: list[Override]) -> DictConfig:
    """The recipe with the words merged in: Hydra's own `+` cannot make an entry that has a type."""
    for word in added:
        value = word.value()
        for name in reversed(word.key_or_group.split(".")):
            value = {name: value}
        with open_dict(config):
            config = OmegaConf.merge(config, value)
    return config


def _typed(config: DictConfig) -> schema.Recipe:
    """Dataclasses all the way down; keys forced in with `+` and unresolved values are found here."""
    try:
        _set_kinds("stages", config.stages, "stage", schema.STAGE_KINDS)
        _set_kinds("evaluation.tasks", config.evaluation.tasks, "task", schema.TASK_KINDS)
        _check_fields(config, "")
        missing = sorted(OmegaConf.missing_keys(config) - {"data_root"})
        if missing:
            raise UserError(f"{missing[0]} has no value; give it as {missing[0]}=VALUE")
        OmegaConf.resolve(config)
        if OmegaConf.is_missing(config, "data_root"):  # no data file is named under it
            config.data_root = None
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error, [])) from None


def _set_kinds(key: str, nodes: DictConfig, what: str, kinds: dict[str, type]) -> None:
    """Refuse an entry of no known kind; one that the command line added gets its kind's type."""
    for name, node in nodes.items():
        kind = node.get("kind") if isinstance(node, DictConfig) else None
        if kind not in kinds:
            raise UserError(f"{key}.{name}.kind={kind} is not a {what} kind; give one of: {', '.join(kinds)}")
        if OmegaConf.get_type(node) is dict:
            known = {f.name for f in dataclasses.fields(kinds[kind])}
            _check_names(f"{key}.{name}", node, known)
            with open_dict(nodes):
                nodes[name] = OmegaConf.structured(kinds[kind])
            nodes[name].merge_with(node)


def _check_fields(node: DictConfig, key: str) -> None:
    """Refuse keys that stand beside a dataclass's fields, at every depth."""
    kind = OmegaConf.get_type(node)
    if dataclasses.is_dataclass(kind):
        _check_names(key, node, {f.name for f in dataclasses.fields(kind)})
    for name in node:
        unresolved = OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name)
        if not unresolved and isinstance(node[name], DictConfig):
            _check_fields(node[name], f"{key}.{name}" if key else str(name))


def _check_names(key: str, node: DictConfig, known: set[str]) -> None:
    if unknown := sorted(set(node) - known):
        raise UserError(_unknown_key(f"{key}.{unknown[0]}" if key else unknown[0], sorted(known)))


# ---------------------------------------------------------------- errors in one line


def _one_line(error: Exception, overrides: list[str]) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException):
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={name} does not exist; choose one of: {', '.join(error.options or ['(none)'])}"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    text = str(cause).splitlines()[0]
    key = getattr(cause, "full_key", None)
    if re.search(r"not in struct|not in '\w+'", text) and key:
        known = (
            [f.name for f in dataclasses.fields(cause.object_type)]
            if dataclasses.is_dataclass(cause.object_type)
            else []
        )
        return _unknown_key(key, known or _keys_beside(key, overrides))
    if "Could not override" in text and "No match in the defaults list" in str(error):
        return f"{text.split(chr(39))[1]} is not a group of this pipeline; groups: {', '.join(GROUPS)}"
    value = next((o.split("=", 1)[1] for o in overrides if key and o.lstrip("+").startswith(key + "=")), None)
    if found := re.search(r"(\w+) is not a subclass of (\w+)", text):
        return f"{key} is {found[1]}, not a {found[2].lower()}; give its fields, as {key}={{FIELD: VALUE}}"
    if key and value is not None:
        return f"{key}={value}: {text[0].lower()}{text[1:]}"
    if isinstance(cause, InterpolationToMissingValueError):
        name = text.rpartition(" ")[2]
        return f"{name} has no value and {key} is named under it; give it as {name}=VALUE"
    return f"{key}: {text}" if key and key not in text else text


def _unreadable(word: str) -> str:
    key, _, value = word.partition("=")
    example = f"{key}='{value}'" if value else "key='VALUE'"
    return (
        f"cannot read the argument {word!r}; write key=value, and quote values that hold = or , or brackets; "
        f'for the shell: "{example}"'
    )


def _keys_beside(key: str, overrides: list[str]) -> list[str]:
    """The keys that exist where `key` was looked for, in the recipe without the failing words."""
    groups = [
        o
        for o in overrides
        if o.split("=", 1)[0] in ("pipeline", "model", "data", "evaluation", "harness", "accelerate")
    ]
    try:
        config, _ = _compose(groups)
    except UserError:
        return []
    parent = key.rpartition(".")[0]
    node = OmegaConf.select(config, parent) if parent else config
    return [str(k) for k in node] if isinstance(node, DictConfig) else []


def _unknown_key(key: str, choices: list[str]) -> str:
    parent, _, name = key.rpartition(".")
    if not choices:
        return f"{key} is not a key of the recipe; +{key}=VALUE adds it where names are free"
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {parent + '.' if parent else ''}{near[0]}? " if near else ""
    more = f"; +{key}=VALUE adds one" if parent in NAMED else ""
    keys = f"keys{' of ' + parent if parent else ''}: {', '.join(sorted(choices))}"
    return f"{key} is not a key of the recipe; {hint}{keys}{more}"


# ---------------------------------------------------------------- do the parts fit together?


def check(recipe: schema.Recipe) -> None:
    """Refuse a recipe whose values cannot mean anything.

    Raises:
        UserError: With the full key, the value, and what would do.
    """
    _check_choices(recipe, "")
    if recipe.harness.tasks and recipe.harness.kind == "none":
        raise UserError(
            f"tasks={','.join(recipe.harness.tasks)} needs a harness; add harness=lm_eval or harness=lighteval"
        )
    for name, stage in recipe.stages.items():
        _check_choices(stage, f"stages.{name}.")
        if isinstance(stage, schema.TrainStage):
            _check_training(name, stage)
        if isinstance(stage, schema.MergeStage):
            total = sum(stage.inputs.values())
            if abs(total - 1) > 1e-6:
                raise UserError(f"stages.{name}.inputs sum to {total:g}; weights of a linear merge sum to 1")
            if stage.base not in stage.inputs:
                raise UserError(
                    f"stages.{name}.base={stage.base} is no input; choose one of: {', '.join(stage.inputs)}"
                )
        if isinstance(stage, schema.MergekitStage):
            _check_mergekit(name, stage)
        if isinstance(stage, schema.ChoosingStage):
            _check_choosing(name, stage, recipe)
        for key, parent in stage.parents():
            if parent == "checkpoint" and not recipe.model.checkpoint:
                raise UserError(
                    f"stages.{name}.{key}=checkpoint, but model.checkpoint has no value; give it as model.checkpoint=ID"
                )
            if parent != "checkpoint" and parent not in recipe.stages:
                stages = ", ".join([*recipe.stages, "checkpoint"])
                raise UserError(
                    f"stages.{name}.{key}={parent} is not a stage of {recipe.pipeline}; choose one of: {stages}"
                )
        for key, mixture in stage.mixtures():
            if mixture not in recipe.data:
                known = ", ".join(recipe.data)
                raise UserError(f"stages.{name}.{key}={mixture} is not a mixture under data; choose one of: {known}")
    for name, task in recipe.evaluation.tasks.items():
        _check_task(name, task, recipe)
    for mixture, rows in recipe.data.items():
        if not rows.sources:
            raise UserError(f"data.{mixture} has no sources; add one: +data.{mixture}.sources.NAME.path=FILE")
        for source, spec in rows.sources.items():
            if spec.weight <= 0:
                raise UserError(f"data.{mixture}.sources.{source}.weight={spec.weight:g} must be above 0")
            if spec.stage is not None and spec.stage not in recipe.stages:
                raise UserError(
                    f"data.{mixture}.sources.{source}.stage={spec.stage} is not a stage of {recipe.pipeline}"
                )


def _check_mergekit(name: str, stage: schema.MergekitStage) -> None:
    if (stage.method is None) == (stage.config is None):
        raise UserError(f"stages.{name} needs a method of mergekit's or a config, its YAML file; give one of them")
    if stage.config and (stage.parameters or stage.base_model or any(stage.inputs.values())):
        raise UserError(
            f"stages.{name}.config={stage.config} states parameters and base_model itself; give the inputs' names "
            "alone, as {NAME: {}}"
        )
    if stage.config and not Path(stage.config).is_file():
        raise UserError(f"stages.{name}.config={stage.config} is not a file; name a mergekit YAML")
    if stage.base not in stage.inputs:
        raise UserError(f"stages.{name}.base={stage.base} is no input; choose one of: {', '.join(stage.inputs)}")


def _check_choosing(name: str, stage: schema.ChoosingStage, recipe: schema.Recipe) -> None:
    inputs = list(dict.fromkeys(parent for _, parent in stage.parents()))
    if stage.base not in inputs:
        raise UserError(f"stages.{name}.base={stage.base} is no input; choose one of: {', '.join(inputs)}")
    for key, metric in stage.metrics_used():
        task, slash, _ = metric.removeprefix("-").partition("/")
        if not slash or task not in recipe.evaluation.tasks:
            raise UserError(
                f"stages.{name}.{key}={metric} is not TASK/METRIC with a task of evaluation.tasks; tasks: "
                f"{', '.join(recipe.evaluation.tasks) or '(none)'}; or leave the stage out with ~stages.{name}"
            )


def _check_task(name: str, task: schema.EvaluationTask, recipe: schema.Recipe) -> None:
    _check_choices(task, f"evaluation.tasks.{name}.")
    for key, mixture in task.mixtures():
        if mixture not in recipe.data:
            raise UserError(
                f"evaluation.tasks.{name}.{key}={mixture} is not a mixture under data; "
                f"choose one of: {', '.join(recipe.data) or '(none)'}"
            )
    for key, path in task.files():
        if not Path(path).is_file():
            raise UserError(f"evaluation.tasks.{name}.{key}={path} is not a file; name one, or leave the task out")
    for stage in task.stages or []:
        if stage not in recipe.stages:
            raise UserError(
                f"evaluation.tasks.{name}.stages={stage} is not a stage of {recipe.pipeline}; "
                f"choose one of: {', '.join(recipe.stages)}"
            )


def _check_choices(node: object, prefix: str) -> None:
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        options = f.metadata.get("choices")
        if options and value not in options:
            raise UserError(f"{prefix}{f.name}={value} is not a choice; choose one of: {', '.join(options)}")
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{prefix}{f.name}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                if dataclasses.is_dataclass(item) and f.name not in ("stages", "tasks"):
                    _check_choices(item, f"{prefix}{f.name}.{key}.")


def _check_training(name: str, stage: schema.TrainStage) -> None:
    minimum = {
        "max_seq_len": 2, "global_batch_size": 1, "micro_batch_size": 1, "pack_tokens": 2, "logging_steps": 1,
        "save_steps": 1, "save_total_limit": 2, "max_steps": 1, "snapshot_steps": 1,
    }  # fmt: skip
    for key, least in minimum.items():
        value = getattr(stage, key, None)
        if value is not None and value < least:
            raise UserError(f"stages.{name}.{key}={value} is below {least}, its least value")
    for key in ("learning_rate", "num_epochs", "max_grad_norm", "adam_epsilon") + (
        ("beta",) if stage.kind == "apo" else ()
    ):
        if getattr(stage, key) <= 0:
            raise UserError(f"stages.{name}.{key}={getattr(stage, key):g} must be above 0")
    for key in ("warmup_ratio", "decay_ratio", "min_lr_ratio", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(stage, key) < 1:
            raise UserError(f"stages.{name}.{key}={getattr(stage, key):g} is outside [0, 1)")
    if not stage.seeds or len(set(stage.seeds)) != len(stage.seeds):
        raise UserError(f"stages.{name}.seeds={stage.seeds} must name at least one seed, each once")
    if stage.lora.r < 0:
        raise UserError(f"stages.{name}.lora.r={stage.lora.r} is below 0, which trains without adapters")
    if stage.lora.r and stage.snapshot_steps:
        raise UserError(
            f"stages.{name}.snapshot_steps={stage.snapshot_steps} keeps whole weights, and stages.{name}.lora.r="
            f"{stage.lora.r} trains adapters; set one of them to null or 0"
        )
    if not 0 <= stage.lora.dropout < 1:
        raise UserError(f"stages.{name}.lora.dropout={stage.lora.dropout:g} is outside [0, 1)")
    if stage.kind == "apo":
        _check_preference(name, stage)


def _check_preference(name: str, stage: schema.APOStage) -> None:
    if not 0 <= stage.label_smoothing < 0.5:
        raise UserError(f"stages.{name}.label_smoothing={stage.label_smoothing:g} is outside [0, 0.5)")
    if stage.label_smoothing and stage.loss != "robust":
        raise UserError(
            f"stages.{name}.label_smoothing={stage.label_smoothing:g} has no part in loss={stage.loss}; "
            "set it to 0, or choose loss=robust"
        )
    if stage.ld_alpha is not None and not 0 <= stage.ld_alpha <= 1:
        raise UserError(f"stages.{name}.ld_alpha={stage.ld_alpha:g} is outside [0, 1]")
    if stage.sft_weight < 0:
        raise UserError(f"stages.{name}.sft_weight={stage.sft_weight:g} is below 0")
    if stage.overlong == "split":
        raise UserError(f"stages.{name}.overlong=split cannot be done to a pair; choose one of: refuse, truncate, drop")
