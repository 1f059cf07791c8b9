"""Modules of the user's own, which a recipe names under `plugins`: imported before the recipe is composed.

They register stage kinds, evaluation tasks, preference losses and row shapes, so that files and words may name these
like the library's own. Pipeline files and words may name plugins; the other files of a recipe may not.
"""

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from smolpost.errors import UserError
from smolpost.recipe import yaml_file
from smolpost.recipe.places import Places
from smolpost.screen import shown

KEY = "plugins"


def load(words: list[Override], places: Places) -> None:
    """Import what the words name, and the pipeline file with those that it starts from.

    A module is found among the installed packages, in the user's recipe folders (that of `pipeline=FILE.yaml` first),
    and in the working directory.

    Raises:
        UserError: There is no such module, or it cannot be imported.
    """
    named = {name: "" for word in words if word.key_or_group == KEY for name in _names(word.value(), "")}
    chosen = [word.value() for word in words if word.key_or_group == "pipeline"]
    start = places.pipeline or places.file(f"pipeline/{chosen[-1] if chosen else 'tiny'}")
    for file in _chain(start, places):
        for name in _names(yaml_file.read(file).get(KEY), shown(file)):
            named.setdefault(name, shown(file))
    for folder in (*places.own, Path.cwd()) if named else ():
        if str(folder.resolve()) not in sys.path:
            sys.path.append(str(folder.resolve()))
    for name, place in named.items():
        _import(name, f"{place}: {KEY}: " if place else f"{KEY}: ")


def _names(value: Any, place: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        where = f"{place}: " if place else ""
        raise UserError(f"{where}{KEY}={value} is not a list of modules; write it as {KEY}=[package.module]")
    return value


def _chain(file: Path | None, places: Places) -> list[Path]:
    """A pipeline file and the pipeline files that its defaults list names, and theirs."""
    found: list[Path] = []
    todo = [file]
    while todo:
        file = todo.pop()
        if file is None or file in found or not yaml_file.read(file):  # which says what is wrong with it
            continue
        found.append(file)
        for entry in yaml_file.defaults(file):
            [(group, name)] = entry.items() if isinstance(entry, dict) else [entry.lstrip("/").rpartition("/")[::2]]
            if group.lstrip("/") in ("", "pipeline") and isinstance(name, str):
                todo.append(places.file(f"pipeline/{name}"))
    return found


def _import(name: str, before: str) -> None:
    try:
        importlib.import_module(name)
    except UserError as error:
        raise UserError(f"{before}{name}: {error}") from None
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"{before}there is no module {name}; put its file beside the pipeline file or into the working "
                "directory, or install its package"
            ) from None
        raise UserError(f"{before}{name} imports {error.name}, which is not installed; install it") from None
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{shown(Path(frame.filename))}, line {getattr(error, 'lineno', None) or frame.lineno}"
        raise UserError(f"{before}{name} cannot be imported ({type(error).__name__}: {error}; {place})") from error
