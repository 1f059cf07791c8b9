"""What files and words say, checked against the schema before it is merged. Errors name the file, key and value."""

import dataclasses
import difflib
import types
import typing
from typing import Any

from omegaconf import BooleanNode, FloatNode, IntegerNode, OmegaConf, StringNode
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from smolpost import schema
from smolpost.errors import UserError, Wrong
from smolpost.registry import STAGE_KINDS, TASK_KINDS
from smolpost.screen import command_line

# Entries that have a kind, which decides their fields: parent -> kinds.
KINDS = {"stages": STAGE_KINDS, "evaluation.tasks": TASK_KINDS}
# Whose entries have names of the user's choice: `+data.NAME=...` adds one, or to one, typed as in a file.
NAMED = ("data", *KINDS)
# Fields that had another name: the field's name today, and what its old values are called.
RENAMED = {"gradient_checkpointing": ("activation_checkpointing", {"true": "full", "false": "none"})}
# Fields that belong to each teacher now: the old name -> the new ones.
MOVED = {
    "chosen_from": ("chosen.stage",),
    "rejected_from": ("rejected.stage",),
    **{
        name: (f"chosen.{name}", f"rejected.{name}")
        for name in ("template", "max_new_tokens", "temperature", "top_p", "batch_size")
    },
}
LEAVES = {
    str: (StringNode, "text"),
    int: (IntegerNode, "a whole number"),
    float: (FloatNode, "a number"),
    bool: (BooleanNode, "true or false"),
}


class Written:
    """Who wrote each key last: a file, or the command line.

    Attributes:
        places: Full key -> file as it is shown to the user, "" for the command line; parents of a key are keys, too.
        kinds: Full key of a stage or task -> its dataclass.
    """

    def __init__(self):
        self.places: dict[str, str] = {}
        self.kinds: dict[str, type] = {}

    def set_kind(self, key: str, kind: type) -> None:
        """Note the kind that a defaults list gives an entry with `/schema/KIND`."""
        self.kinds[key] = kind
        self.places |= {key: "", key.rpartition(".")[0]: ""}

    def learn_kinds(self, content: dict) -> None:
        """Note the kinds that entries state themselves, unless a defaults list gave them one."""
        for parent, kinds in KINDS.items():
            entries: object = content
            for name in parent.split("."):
                entries = entries.get(name) if isinstance(entries, dict) else None
            for name, entry in entries.items() if isinstance(entries, dict) else ():
                kind = entry.get("kind") if isinstance(entry, dict) else None
                if isinstance(kind, str) and kind in kinds:
                    self.kinds.setdefault(f"{parent}.{name}", kinds[kind])

    def add(self, content: dict, place: str, *, new: bool = True) -> None:
        """Take what a file or a word says.

        Args:
            content: Nested keys and values, from the root of the recipe.
            place: The file, or "" for the command line.
            new: Names that nobody wrote so far may be added where names are free.
        Raises:
            UserError: A key does not exist, or a value has the wrong type.
        """
        self._add("", content, schema.Recipe, place, new)

    def remove(self, key: str) -> None:
        """A word `~key`.

        Raises:
            UserError: Nobody wrote the key.
        """
        if key not in self.places:
            raise self._unknown(key, self._beside(key), "")
        for known in [k for k in self.places if k == key or k.startswith(f"{key}.")]:
            del self.places[known]
            self.kinds.pop(known, None)

    def check_settings(self, key: str, settings: dict, kind: type, of: str) -> None:
        """Hold settings whose names depend on another value against the dataclass that this value stands for.

        Args:
            of: The other value, in words, e.g. loss=robust.
        Raises:
            UserError: A setting does not exist, or its value has the wrong type.
        """
        hints = {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}
        for name, value in settings.items():
            full, known = _join(key, name), _list(hints) or "(none)"
            place = self.places.get(full, "")
            if name not in hints:
                hint = near("", name, hints)
                raise _in_file(
                    place,
                    f"{full} is not a setting of {of}; {hint}settings: {known}; leave it out with ~{full}",
                )
            self._add(full, value, hints[name], place, new=True)

    def place(self, key: str) -> str:
        """The file that wrote a key, or "the command line"."""
        return self.places.get(key) or "the command line"

    def located(self, error: Wrong) -> UserError:
        """The error, with the file that wrote the key in front; unchanged if the command line wrote it."""
        key = error.key
        while key and key not in self.places:  # a key that nobody wrote: whoever wrote what it is part of
            key = key.rpartition(".")[0]
        return _in_file(self.places.get(key, ""), str(error))

    def _add(self, key: str, value: object, kind: Any, place: str, new: bool) -> None:
        kind, optional = _without_none(kind)
        unresolved = isinstance(value, str) and (value == schema.MISSING or "${" in value)
        if unresolved:
            _check_interpolation(key, value, place)
        if unresolved or kind is Any or (value is None and optional):
            self._note(key, value, place, new)
        elif dataclasses.is_dataclass(kind):
            self._add_fields(key, value, kind, place, new)
        elif typing.get_origin(kind) is dict:
            self._add_entries(key, value, typing.get_args(kind)[1], place, new)
        elif typing.get_origin(kind) is list:
            self._add_items(key, value, typing.get_args(kind)[0], place, new)
        else:
            _check_leaf(key, value, kind, place)
            self.places[key] = place

    def _add_fields(self, key: str, value: object, kind: type, place: str, new: bool) -> None:
        if not isinstance(value, dict):
            raise _not_fields(key, value, place)
        self.places[key] = place
        types_of = typing.get_type_hints(kind)
        hints = {field.name: types_of[field.name] for field in dataclasses.fields(kind)}  # without class attributes
        for name, item in value.items():
            full = _join(key, name)
            if name in RENAMED and RENAMED[name][0] in hints:
                raise _renamed(full, item, place)
            if name in MOVED and name not in hints and {"chosen", "rejected"} <= hints.keys():
                raise _moved(full, item, place)
            if name not in hints:
                raise self._unknown(full, list(hints), place)
            self._add(full, item, hints[name], place, new)

    def _add_entries(self, key: str, value: object, kind: Any, place: str, new: bool) -> None:
        if not isinstance(value, dict):
            example = _example(key, "{NAME: VALUE}", place)
            raise _in_file(place, f"{key}={text(value)} is not a mapping; write it as {example}")
        self.places[key] = place
        for name, item in value.items():
            full = _join(key, name)
            if not new and full not in self.places:
                raise self._unknown(full, self._beside(full), place)
            self._add(full, item, self._entry_kind(full, item, place) if key in KINDS else kind, place, new)

    def _entry_kind(self, key: str, value: object, place: str) -> Any:
        parent, _, name = key.rpartition(".")
        kinds, what = KINDS[parent], parent.rpartition(".")[2].removesuffix("s")
        if not isinstance(value, dict):
            raise _not_fields(key, value, place)
        said = value.get("kind")
        if said is not None and not (isinstance(said, str) and said in kinds):
            raise _in_file(
                place,
                f"{key}.kind={text(said)} is not a {what} kind; choose one of: {_list(kinds)}",
            )
        found = self.kinds.get(key)
        if found is None:
            known = [k.rpartition(".")[2] for k in self.kinds if k.rpartition(".")[0] == parent]
            raise _in_file(
                place,
                f"{key} has no kind; {near(parent, name, known)}a new {what} states it, `kind: KIND` in its "
                f"file or {key}.kind=KIND; "
                f"choose one of: {_list(kinds)}",
            )
        if said is not None and found is not kinds[said]:
            raise _in_file(
                place, f"{key}.kind={said}, but it was made as {found.kind}; give the new one a name of its own"
            )
        return found

    def _add_items(self, key: str, value: object, kind: Any, place: str, new: bool) -> None:
        if not isinstance(value, list):
            example = "[A, B]" if not value or isinstance(value, dict) else f"[{value}]"
            raise _in_file(place, f"{key}={text(value)} is not a list; write {_example(key, example, place)}")
        for item in value:
            self._add(key, item, kind, place, new)
        self.places[key] = place

    def _note(self, key: str, value: object, place: str, new: bool) -> None:
        """Keys whose values have no type: mergekit's parameters, accelerate's settings, interpolations."""
        self.places[key] = place
        for name, item in value.items() if isinstance(value, dict) else ():
            full = _join(key, name)
            if not new and full not in self.places:
                raise self._unknown(full, self._beside(full), place)
            self._note(full, item, place, new)

    def _beside(self, key: str) -> list[str]:
        """Names that were written where `key` was looked for."""
        parent = key.rpartition(".")[0]
        return [known.rpartition(".")[2] for known in self.places if known and known.rpartition(".")[0] == parent]

    def _unknown(self, key: str, choices: list[str], place: str) -> UserError:
        parent, _, name = key.rpartition(".")
        keys = f"keys{' of ' + parent if parent else ''}: {_list(sorted(choices)) or '(none)'}"
        free = parent in NAMED or (parent and not choices)
        more = f"; +{key}=VALUE adds one" if free and not place else ""
        return _in_file(place, f"{key} is not a key of the recipe; {near(parent, name, choices)}{keys}{more}")


def _renamed(key: str, value: object, place: str) -> UserError:
    parent, _, name = key.rpartition(".")
    new, values = RENAMED[name]
    written = values.get(text(value).lower(), next(iter(values.values())))
    return _in_file(place, f"{key}={text(value)} is now called {new}; write {_join(parent, new)}={written}")


def _moved(key: str, value: object, place: str) -> UserError:
    parent, _, name = key.rpartition(".")
    written = " and ".join(f"{_join(parent, new)}={text(value)}" for new in MOVED[name])
    return _in_file(place, f"{key}={text(value)} is a field of the stage's teachers now; write {written}")


def text(value: object) -> str:
    """A value as YAML writes it in one line, cut where it is long."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    shown = f"{value:g}" if isinstance(value, float) else str(value).replace("\n", " ")
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _check_leaf(key: str, value: object, kind: type, place: str) -> None:
    node, what = LEAVES[kind]
    try:
        node(value=value, is_optional=False)
    except OmegaConfBaseException:
        raise _in_file(place, f"{key}={text(value)} is not {what}") from None


def _check_interpolation(key: str, value: str, place: str) -> None:
    try:
        OmegaConf.create([value])
    except GrammarParseError:
        raise _in_file(place, f"{key}={text(value)} cannot be read; write ${{KEY}} for another key's value") from None


def _without_none(kind: Any) -> tuple[Any, bool]:
    """`int | None` -> int, True; `int` -> int, False."""
    if isinstance(kind, types.UnionType):
        [inner] = [k for k in typing.get_args(kind) if k is not types.NoneType]
        return inner, True
    return kind, False


def near(parent: str, name: object, choices) -> str:
    near = difflib.get_close_matches(str(name), list(choices), n=1)
    return f"did you mean {_join(parent, near[0])}? " if near else ""


def _in_file(place: str, line: str) -> UserError:
    return UserError(f"{place}: {line}" if place else line)


def _not_fields(key: str, value: object, place: str) -> UserError:
    example = _example(key, "{FIELD: VALUE}", place)
    return _in_file(place, f"{key}={text(value)} has no fields; give them, as {example}")


def _example(key: str, value: str, place: str) -> str:
    """The setting as a file writes it, or as a word quoted for the shell."""
    return f"{key}={value}" if place else command_line([f"{key}={value}"])


def _join(parent: str, name: object) -> str:
    return f"{parent}.{name}" if parent else str(name)


def _list(names) -> str:
    return ", ".join(names)
