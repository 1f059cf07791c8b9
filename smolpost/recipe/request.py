"""From the words of a command line to one typed Recipe."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from smolpost import schema
from smolpost.errors import UserError, Wrong
from smolpost.recipe import secrets
from smolpost.recipe.checks import check
from smolpost.recipe.compose import Composed, compose_recipe
from smolpost.recipe.places import Places
from smolpost.recipe.written import KINDS, text


@dataclass(frozen=True)
class Request:
    """What a command line asks for.

    Attributes:
        recipe: The whole pipeline, typed.
        stage: The one stage meant, or None for all; not a part of the recipe, so it changes no cache key.
        overrides: The command line's words without `stage=`, `--recipes=FOLDER` among them, to be repeated by the
            stages' commands.
        accelerate: The chosen accelerate config.
        launch_flags: Values of it that the command line changed, e.g. {"num_processes": 2}.
        replaced: A line for each of the library's recipe files that one of the user's stands for.
        environment: Full key of a value that comes from the environment -> what is shown of it, "${oc.env:NAME}".
    """

    recipe: schema.Recipe
    stage: str | None
    overrides: tuple[str, ...]
    accelerate: Path
    launch_flags: dict
    replaced: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class _Words:
    overrides: tuple[str, ...]  # all but stage=, to be repeated
    hydra: list[str]
    places: Places
    stage: str | None


def load(words: list[str]) -> Request:
    """Compose the recipe that the command line's `key=value` words describe.

    `stage=` is not a part of it, `tasks=A,B` is short for the harness's tasks in place of its own list,
    `pipeline=FILE.yaml` names the pipeline by its file, `pipeline=NAME` also finds a file of the user's own
    (`places.own_pipelines`), and `--recipes=FOLDER` or `--config-dir=FOLDER` is a folder that is searched first.

    Raises:
        UserError: A word or a file cannot be read, a group, key or value does not exist or has the wrong type, or the
            parts of the recipe do not fit together.
    """
    asked = _asked(words)
    composed = compose_recipe(asked.hydra, asked.places)
    recipe = _checked(composed)
    _check_data_root(composed, asked.places)
    return Request(
        recipe=recipe,
        stage=asked.stage,
        overrides=asked.overrides,
        accelerate=composed.accelerate,
        launch_flags=_launch_flags(recipe, composed),
        replaced=tuple(composed.replaced),
        environment=secrets.environment(composed.config),
    )


def as_yaml(words: list[str], *, resolve: bool) -> str:
    """The composed recipe as YAML. Interpolations are resolved on request; those of the environment never are.

    Raises:
        UserError: As `load` does.
    """
    asked = _asked(words)
    composed = compose_recipe(asked.hydra, asked.places)
    _checked(composed)
    return secrets.as_yaml(composed.config, resolve=resolve)


def _checked(composed: Composed) -> schema.Recipe:
    secrets.mask(composed.config)
    try:
        recipe = _typed(copy.deepcopy(composed.config))
        harness = recipe.harness
        harness.headline = {task: metric for task, metric in harness.headline.items() if task in harness.tasks}
        check(recipe, composed.written)
    except Wrong as error:
        raise composed.written.located(error) from None
    return recipe


def _check_data_root(composed: Composed, places: Places) -> None:
    """Refuse a data folder that nothing is read from: the rows would be others than those in it."""
    under = "${data_root}"
    root = composed.config.data_root if not OmegaConf.is_missing(composed.config, "data_root") else None
    if root is None or under in str(OmegaConf.to_container(composed.config)):
        return
    named = [
        name for name in places.options("data") if under in places.file(f"data/{name}").read_text(encoding="utf-8")
    ]
    raise UserError(
        f"data_root={root}, but no file of this recipe is named under it; leave it out, or choose the data that is: "
        + " or ".join(f"data={name}" for name in named)
    )


def _asked(words: list[str]) -> _Words:
    stage = pipeline = None
    overrides, hydra, folders = [], [], []
    words = list(words)
    while words:
        word = words.pop(0)
        name, _, value = word.partition("=")
        if name == "stage":
            stage = value
            continue
        if name in ("--recipes", "--config-dir"):
            folders.append(value or (words.pop(0) if words else ""))
            word = f"--recipes={folders[-1]}"
        elif name == "tasks":
            word = f"harness.tasks=[{value}]"
            hydra.append(word)
        elif name == "pipeline":
            pipeline = value
        else:
            hydra.append(word)
        overrides.append(word)
    places = Places.of(folders, pipeline)
    if pipeline is not None and places.pipeline is None:
        hydra.append(f"pipeline={pipeline}")
    return _Words(tuple(overrides), hydra, places, stage)


def _launch_flags(recipe: schema.Recipe, composed: Composed) -> dict:
    in_file = OmegaConf.to_container(OmegaConf.load(composed.accelerate))
    return {key: value for key, value in recipe.accelerate.items() if in_file.get(key) != value}


def _typed(config: DictConfig) -> schema.Recipe:
    """The recipe as dataclasses; missing values and broken interpolations are found here."""
    try:
        for parent, kinds in KINDS.items():
            _set_kinds(OmegaConf.select(config, parent), kinds)
        missing = sorted(OmegaConf.missing_keys(config) - {"data_root"})
        if missing:
            raise Wrong(missing[0], f" has no value; give it as {missing[0]}=VALUE")
        OmegaConf.resolve(config)
        if OmegaConf.is_missing(config, "data_root"):  # no data file is named under it
            config.data_root = None
        return OmegaConf.to_object(config)
    except InterpolationToMissingValueError as error:
        name = str(error).splitlines()[0].rpartition(" ")[2]
        raise UserError(
            f"{name} has no value and {error.full_key} is named under it; give it as {name}=VALUE"
        ) from None
    except OmegaConfBaseException as error:
        raise _unresolved(error, config) from None


def _set_kinds(nodes: DictConfig, kinds: dict[str, type]) -> None:
    """Give a type to the entries that state their kind themselves and not by a defaults list."""
    for name, node in nodes.items():
        if OmegaConf.get_type(node) is dict:
            typed = OmegaConf.structured(kinds[node.kind])
            typed.merge_with(node)  # before it is in the recipe, whose mappings take no further keys
            with open_dict(nodes):
                nodes[name] = typed


def _unresolved(error: OmegaConfBaseException, config: DictConfig) -> Wrong:
    key = (error.full_key or "").partition("[")[0]
    raw = OmegaConf.to_container(config)
    for name in key.split("."):
        raw = raw.get(name) if isinstance(raw, dict) else None
    why = str(error).splitlines()[0]
    if found := re.search(r"Environment variable '(\w+)' not found", why):
        why = f"the environment variable {found[1]} is not set; export it, or write ${{oc.env:{found[1]},DEFAULT}}"
    elif found := re.search(r"Interpolation key '(.+?)' not found", why):
        why = f"{found[1]} is not a key of the recipe; name a key from its root, such as ${{run_dir}}"
    else:
        why = why.rpartition("': ")[2]
    return Wrong(key, f"={text(raw)}: {why[:1].lower()}{why[1:]}")
