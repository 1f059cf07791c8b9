"""Hydra's part: it takes files and words and gives one untyped config. Each error is one line that says where it is."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from smolpost import schema
from smolpost.errors import UserError
from smolpost.recipe import plugins, yaml_file
from smolpost.recipe.places import GROUPS, PACKAGE, PLACED, Places
from smolpost.recipe.written import NAMED, Written, near
from smolpost.registry import STAGE_KINDS, TASK_KINDS
from smolpost.screen import command_line, shown

ROOT = "recipe_root"  # what every recipe starts from: a pipeline chooses everything else
EMPTY = "nothing"  # to which a file is added that is wanted alone


class Composed(NamedTuple):
    """A recipe before it is typed.

    Attributes:
        config: All that files and words say, merged.
        written: Who wrote which key.
        accelerate: The chosen accelerate config.
        replaced: A line for each of the library's files that one of the user's stands for.
    """

    config: DictConfig
    written: Written
    accelerate: Path
    replaced: list[str]


def compose_recipe(words: list[str], places: Places) -> Composed:
    """Merge the files that the words choose, and the words.

    Raises:
        UserError: A word or a file cannot be read, or says what the schema does not have.
    """
    parsed = _parse(words)
    plugins.load(parsed, places)
    _store_schema()
    if places.pipeline is not None:
        words = [*words, f"pipeline='../{_quoted(places.pipeline.stem)}'"]
    with _searching(places) as search:
        defaults = _defaults([search, *words], places)
        choices = defaults.overrides.known_choices
        unmeasured = [word.value() for word in parsed if word.key_or_group == "evaluation"][-1:] == ["none"]
        kept = [word.package for word in parsed if word.package]  # +schema@evaluation.tasks.NAME adds one all the same
        config_words = {word.input_line for word in defaults.config_overrides}
        parsed = [word for word in parsed if word.input_line in config_words]
        written = _written(defaults.defaults, parsed, places, unmeasured)
        added = _added(parsed)
        others = [word for word in words if word not in {a.input_line for a in added}]
        config = _merged([search, *others], added, places, kept if unmeasured else None)
    if OmegaConf.is_missing(config, "pipeline"):
        config.pipeline = Path(choices["pipeline"]).name
    accelerate = places.file(f"accelerate/{choices.get('accelerate')}")
    if accelerate is None:
        file = places.file(f"pipeline/{choices['pipeline']}")
        raise UserError(f"{shown(file)}: chooses no accelerate config; add `- /accelerate: single` to its defaults")
    replaced = places.shadowed([default.config_path for default in defaults.defaults])
    return Composed(config, written, accelerate, replaced)


def compose_file(group: str, name: str, places: Places) -> DictConfig:
    """The keys of one file, merged with the files of its defaults list.

    Raises:
        UserError: There is no such file, or one of them cannot be read.
    """
    ConfigStore.instance().store(name=EMPTY, node={})
    with _searching(places) as search:
        try:
            return compose(EMPTY, overrides=[search, f"+{group}='{_quoted(name)}'"])[group]
        except MissingConfigException as error:
            raise UserError(_missing(error, [f"{group}={name}"], places)) from None
        except yaml.MarkedYAMLError as error:
            raise UserError(yaml_file.syntax(error)) from None
        except (HydraException, OmegaConfBaseException, ValueError, TypeError, OSError, RecursionError) as error:
            for file in places.own_files():
                yaml_file.read(file)
            raise UserError(_one_line(error, places)) from None


@contextlib.contextmanager
def _searching(places: Places) -> Iterator[str]:
    """Hydra, ready to compose; gives the word that names the folders to search."""
    folders = [str(folder.resolve()) for folder in places.folders]
    search = ",".join(f"'file://{_quoted(folder)}'" for folder in folders[1:])
    GlobalHydra.instance().clear()
    with initialize_config_dir(folders[0], version_base="1.3"):
        yield f"hydra.searchpath=[{search}]"


def _store_schema() -> None:
    store = ConfigStore.instance()
    store.store(name="recipe_schema", node=schema.Recipe)
    store.store(name=ROOT, node={"defaults": ["recipe_schema", {"pipeline": "tiny"}, {"harness": "none"}, "_self_"]})
    for kind, node in (*STAGE_KINDS.items(), *TASK_KINDS.items()):
        store.store(group="schema", name=kind, node=node)


def _parse(words: list[str]) -> list[Override]:
    try:
        parsed = OverridesParser.create().parse_overrides(words)
    except OverrideParseException as error:
        raise UserError(_unreadable(error.override)) from None
    for word in parsed:
        if word.is_sweep_override():  # several values for one key, which Hydra has for --multirun
            raise UserError(_unreadable(word.input_line))
        if word.key_or_group.split(".")[0] == "hydra":
            remedy = (
                "--recipes FOLDER names a folder of recipes" if "searchpath" in word.key_or_group else "leave it out"
            )
            raise UserError(f"{word.input_line}: Hydra's own settings have no part in a recipe; {remedy}")
    return parsed


def _defaults(words: list[str], places: Places) -> Any:
    """Hydra's defaults list: the files in merge order, each with its place in the recipe."""
    try:
        return GlobalHydra.instance().config_loader().compute_defaults_list(ROOT, words, RunMode.RUN)
    except MissingConfigException as error:
        raise UserError(_missing(error, words, places)) from None
    except yaml.MarkedYAMLError as error:
        raise UserError(yaml_file.syntax(error)) from None
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, OSError, RecursionError) as error:
        files = places.own_files()
        for file in files:  # faults of a file that Hydra does not name
            yaml_file.read(file)
        if isinstance(error, RecursionError):
            names = ", ".join(map(shown, files))
            raise UserError(f"the defaults lists of {names} lead back to themselves; take an entry out") from None
        raise UserError(_one_line(error, places, from_files=True)) from None


def _written(defaults: list, words: list[Override], places: Places, unmeasured: bool) -> Written:
    """Everything that the files (in their order) and then the words say, checked against the schema."""
    written = Written()
    contents: list[tuple[dict, str]] = []
    for default in defaults:
        group, _, name = default.config_path.partition("/")
        file = places.file(default.config_path)
        if group == "schema":
            if default.package.rpartition(".")[0] not in ("stages", "evaluation.tasks"):
                raise UserError(_misplaced(default, defaults, places))
            written.set_kind(default.package, ({**STAGE_KINDS, **TASK_KINDS})[name])
        elif file is not None and group != "hydra":
            content = yaml_file.read(file)
            if group == "pipeline" and default.package:
                raise UserError(f"{shown(file)}: a pipeline file starts with the line `{PACKAGE}`")
            contents.append((_nested(default.package, content), shown(file)))
    if unmeasured:
        for content, _ in contents:
            if isinstance(content.get("evaluation"), dict):
                content["evaluation"].pop("tasks", None)
    said = [_content(word) for word in words if not word.is_delete()]
    for content in (*(content for content, _ in contents), *said):
        written.learn_kinds(content)
    for content, place in contents:
        written.add(content, place)
    for word in words:
        if word.package is not None:
            raise UserError(f"{word.input_line}: {word.key_or_group} is not a group; groups: {', '.join(GROUPS)}")
        if word.is_delete():
            written.remove(word.key_or_group)
        else:
            written.add(_content(word), "", new=word.is_add() or word.is_force_add())
    return written


def _misplaced(schema_entry: Any, defaults: list, places: Places) -> str:
    group, _, name = schema_entry.parent.partition("/")
    choosing = next((entry.parent for entry in defaults if entry.config_path == schema_entry.parent), None)
    file = places.file(choosing or schema_entry.parent)
    return (
        f"{shown(file)}: {group}/{name} stands at {schema_entry.package or 'the root'}; its place is stages.NAME or "
        f"evaluation.tasks.NAME, written as `- /{group}@stages.NAME: {name}`"
    )


def _added(words: list[Override]) -> list[Override]:
    """Words with `+`, and words about the entries that these add. Hydra's own `+` cannot add a typed entry."""
    adding = [word for word in words if word.is_add() or word.is_force_add()]
    touched = {_entry(word) for word in adding} - {None}
    return [word for word in words if word in adding or (_entry(word) in touched and not word.is_delete())]


def _entry(word: Override) -> str | None:
    """The entry of NAMED that a word is about, such as data.NAME."""
    for parent in NAMED:
        if word.key_or_group.startswith(f"{parent}."):
            return f"{parent}.{word.key_or_group.removeprefix(f'{parent}.').split('.')[0]}"
    return None


def _content(word: Override) -> dict:
    return _nested(word.key_or_group, word.value())


def _nested(key: str, value: Any) -> Any:
    for name in reversed(key.split(".") if key else []):
        value = {name: value}
    return value


def _merged(words: list[str], added: list[Override], places: Places, kept: list[str] | None) -> DictConfig:
    """The recipe.

    Args:
        kept: Where the recipe measures nothing: full keys of the tasks that the words add; None keeps all tasks.
    """
    try:
        config = compose(ROOT, overrides=words)
        if kept is not None:
            tasks = config.evaluation.tasks
            with open_dict(config):
                config.evaluation.tasks = {name: tasks[name] for name in tasks if f"evaluation.tasks.{name}" in kept}
        for word in added:
            with open_dict(config):
                config = OmegaConf.merge(config, _content(word))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error, places)) from None
    return config


# ---------------------------------------------------------------- errors in one line


def _missing(error: MissingConfigException, words: list[str], places: Places) -> str:
    group, _, name = (error.missing_cfg_file or "").partition("/")
    asked = any(re.fullmatch(rf"\+?{re.escape(group)}(@.*)?='?{re.escape(name)}'?", word) for word in words)
    parent = re.match(r"In '(.+?)':", str(error))
    file = places.file(parent[1]) if parent and not asked else None
    options = places.options(group) or ([*STAGE_KINDS, *TASK_KINDS] if group == "schema" else [])
    groups = ("pipeline", "stage", *GROUPS)
    if group == "pipeline" and (why := places.unusable(name)):
        line = f"pipeline={name} does not exist; {why}"
    elif name and options:
        line = f"{group}={name} does not exist; {near('', name, options)}choose one of: {', '.join(options)}"
    elif name:
        line = f"{group} is not a group; {near('', group, groups)}groups: {', '.join(groups)}"
    else:
        line = f"{group} is not a file beside it; write /GROUP/NAME, with one of the groups {', '.join(groups)}"
    return f"{shown(file)}: {line}" if file else line


def _one_line(error: Exception, places: Places, *, from_files: bool = False) -> str:
    """An error that only Hydra or OmegaConf finds, with the file instead of its name in a defaults list."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if choice := re.match(r"Could not override '(.+?)'", lines[0]):
        return _not_chosen(choice[1], re.findall(r"@([\w.]+)", lines[1]) if lines[1].startswith("Did you mean") else [])
    if cause is not None:
        lines = [f"{cause.full_key}: {str(cause).splitlines()[0]}" if cause.full_key else str(cause).splitlines()[0]]
    named = re.match(r"In '?(.+?)'?:\s*(.*)", lines[0])
    if named is None:
        return f"{shown(places.pipeline)}: {lines[0]}" if places.pipeline and from_files else lines[0]
    file = places.file(named[1])
    said = lines[1] if named[2].endswith("raised while composing config:") and len(lines) > 1 else named[2]
    return f"{shown(file) if file else named[1]}: {said[:1].lower()}{said[1:]}"


def _not_chosen(word: str, places: list[str]) -> str:
    """A word that would replace a choice that the pipeline does not make.

    Args:
        word: GROUP or GROUP@PLACE.
        places: Where the pipeline chooses a file of the group.
    """
    group, _, place = word.partition("@")
    if group not in ("stage", *GROUPS):
        return f"{word} is not a group of this pipeline; groups: {', '.join(GROUPS)}"
    if not place and group in PLACED:
        written = [f"{group}@{one}=NAME" for one in places] or [f"+{group}@{PLACED[group]}=NAME"]
        return f"{word} is chosen for one place at a time; write {' or '.join(written)}"
    if place and group not in PLACED:
        return f"{word}: a recipe has one {group}, at no place of its own; write {group}=NAME"
    hint = near("", place, places) or (f"it chooses one at {', '.join(places)}; " if places else "")
    return f"{word}: this pipeline chooses no {group}{f' at {place}' if place else ''}; {hint}+{word}=NAME adds one"


def _unreadable(word: str) -> str:
    key, _, value = word.partition("=")
    example = f"{key}='{_quoted(value or 'VALUE')}'"
    for_shell = command_line([example]) if set(example) & set('$`"\\!') else f'"{example}"'
    return (
        f"cannot read the argument {word!r}; write key=value, and quote values that hold = or , or brackets, quotes or "
        f"letters beyond ASCII; for the shell: {for_shell}"
    )


def _quoted(value: str) -> str:
    """The value as Hydra's grammar writes it between single quotes."""
    return re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", value))
