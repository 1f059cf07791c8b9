"""One YAML file of a recipe, or one line that says what is wrong with it and where."""

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError

from smolpost.errors import UserError
from smolpost.screen import shown

DEFAULTS = "write `- /GROUP: NAME` or `- _self_` in each line"


def read(path: Path) -> dict:
    """The file's keys and values without its defaults list; interpolations stay as they are written.

    Raises:
        UserError: It is not YAML, is empty, holds no keys, or has a defaults list that is not one.
    """
    try:
        with open(path, encoding="utf-8") as file:
            config = OmegaConf.load(file)
    except yaml.MarkedYAMLError as error:
        raise UserError(syntax(error)) from None
    except yaml.YAMLError as error:
        raise UserError(f"{shown(path)}: is not YAML ({str(error).splitlines()[0]})") from None
    except GrammarParseError as error:
        raise UserError(
            f"{shown(path)}: {str(error).splitlines()[0]}; write ${{KEY}} for another key's value"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{shown(path)}: is not text in UTF-8; save it as UTF-8") from None
    except OSError as error:  # OmegaConf's own, without a reason of the system, for a number alone
        what = f"cannot be read: {error.strerror}" if error.strerror else "holds a single value; write KEY: VALUE lines"
        raise UserError(f"{shown(path)}: {what}") from None
    content = OmegaConf.to_container(config)
    if not content:
        raise UserError(f"{shown(path)}: is empty; write KEY: VALUE lines, or `tasks: {{}}` and the like for nothing")
    if not isinstance(config, DictConfig):
        raise UserError(f"{shown(path)}: holds a list; write KEY: VALUE lines")
    if list(content.values()) == [None] and ":" not in path.read_text(encoding="utf-8"):
        raise UserError(f"{shown(path)}: holds a single value; write KEY: VALUE lines")
    _check_defaults(path, content.pop("defaults", []))
    _check_keys(path, content)
    return content


def defaults(path: Path) -> list:
    """The entries of the defaults list of a file that `read` accepts."""
    with open(path, encoding="utf-8") as file:
        return OmegaConf.to_container(OmegaConf.load(file)).get("defaults", [])


def _check_keys(path: Path, value: object) -> None:
    for key, item in value.items() if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise UserError(f"{shown(path)}: the key {key} is not text; write '{key}' in quotes")
        _check_keys(path, item)


def syntax(error: yaml.MarkedYAMLError) -> str:
    """A fault that the YAML reader has found, in one line with file and line number."""
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context
    if "'\\t'" in problem:
        problem = "a tab; YAML is indented with spaces"
    elif problem.startswith("found duplicate key "):
        problem = f"{problem.removeprefix('found duplicate key ')} stands twice; keep one of the two"
    else:
        problem = f"is not YAML ({problem}); quote values that hold : or # or brackets, and indent keys alike"
    return f"{shown(Path(mark.name))}:{mark.line + 1}: {problem}"


def _check_defaults(path: Path, defaults: object) -> None:
    if not isinstance(defaults, list):
        raise UserError(f"{shown(path)}: defaults={defaults} is not a list; {DEFAULTS}")
    for entry in defaults:
        pairs = list(entry.items()) if isinstance(entry, dict) else [(entry, None)]
        fits = len(pairs) == 1 and isinstance(pairs[0][0], str) and isinstance(pairs[0][1], str | list | None)
        if not fits:
            raise UserError(f"{shown(path)}: defaults has the entry {entry}; {DEFAULTS}")
        if entry in (path.stem, f"/{path.parent.name}/{path.stem}"):
            raise UserError(f"{shown(path)}: defaults has the entry {entry}, the file itself; give it another name")
