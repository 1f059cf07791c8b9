"""The pipeline that an import writes, and what it says about each key of the file."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from smolpost.importing.keys import Keys, brief


class Group(StrEnum):
    """What can be said of a key; the values are the titles in the list."""

    DIFFERS = "without a counterpart: the training differs"
    BROKEN = "ignored or refused by the tool itself"
    UNKNOWN = "unknown to this command and to the tool"
    TRANSLATED = "translated"
    DEFAULT = "not set in the file, so the tool's own defaults are written"
    LEFT_OUT = "left out: the training is the same"


@dataclass(frozen=True)
class Setting:
    """A value of the pipeline.

    Attributes:
        keys: Keys of the file that it comes from, with their values; empty for a default of the tool.
        note: Why it is this value, where that is not plain.
    """

    value: Any
    keys: tuple[str, ...]
    note: str


@dataclass
class Draft:
    """
    Attributes:
        file: The file that is imported.
        keys: Its keys.
        tool: The tool's name in messages.
        stage: Name of the stage that is written.
        accelerate: The chosen file of recipes/accelerate.
        settings: Our full key -> value, in the order in which they are written.
        said: Group -> what is said -> the keys that it is said of.
        template: Text of a chat template that goes into a file beside the pipeline, or None.
        assumed: What was assumed about the launch, or "".
        told: Keys of the file of which something is said.
    """

    file: Path
    keys: Keys
    tool: str
    stage: str
    accelerate: str = "single"
    settings: dict[str, Setting] = field(default_factory=dict)
    said: dict[Group, dict[str, list[str]]] = field(default_factory=lambda: {group: {} for group in Group})
    template: str | None = None
    assumed: str = ""
    told: set[str] = field(default_factory=set)

    @property
    def trainer(self) -> str:
        """Whose defaults hold: alignment-handbook's are those of TRL."""
        return "TRL" if self.tool == "alignment-handbook" else self.tool

    # ------------------------------------------------------------ the pipeline

    def set(self, ours: str, value: Any, *names: str, note: str = "") -> None:
        """Write a value.

        Args:
            ours: Our full key; one that begins with a point belongs to the stage.
            names: Keys of the file that it comes from; none for a default of the tool.
        """
        keys = tuple(self._shown(name) for name in names)
        self.told.update(names)
        self.settings[f"stages.{self.stage}{ours}" if ours.startswith(".") else ours] = Setting(
            _filled(value), keys, note
        )

    def copy(self, name: str, ours: str, kind: type, default: Any) -> Any:
        """Write the value of a key, or the tool's default."""
        value = self.keys.take(name, kind, default)
        self.set(ours, value, *([name] if self.keys.given(name) else []))
        return value

    # ------------------------------------------------------------ the list

    def differs(self, name: str, what: str) -> None:
        self._say(Group.DIFFERS, name, what)

    def left_out(self, name: str, what: str) -> None:
        self._say(Group.LEFT_OUT, name, what)

    def broken(self, name: str, what: str, hint: str = "") -> None:
        """
        Args:
            hint: Of this key alone.
        """
        self._say(Group.BROKEN, name, what, f" ({hint})" if hint else "")

    def sort_out(self, left_out: Mapping[str, Iterable[str]], differing: Mapping[str, tuple[tuple, str]]) -> None:
        """Say what becomes of the keys of which nothing is said yet.

        Args:
            left_out: What is said -> keys that do not change what is trained.
            differing: Key -> (values at which it changes nothing, what is done instead).
        """
        nothing = "they change nothing at the values that they have"
        for name in self.keys.values:
            if name in self.keys.read and self.keys.given(name) and name not in self.told:
                self.left_out(name, nothing)
        for name in self.keys.unread():
            what = next((what for what, names in left_out.items() if name in names), None)
            neutral, instead = differing.get(name, ((), None))
            if what is not None:
                self.left_out(name, what)
            elif instead is not None and any(self.keys.values[name] == value for value in neutral):
                self.left_out(name, nothing)
            elif instead is not None:
                self.differs(name, instead)
            else:
                continue
            self.keys.read.add(name)

    def unknown(self, keys: Keys, known: Iterable[str], what: str) -> None:
        """Say of each key that is still unread that nobody knows it."""
        known = list(known)
        for name in keys.unread():
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            keys.read.add(name)
            self._say(Group.UNKNOWN, f"{keys.where}{name}: {brief(keys.values[name])}", f"{what}{hint}")

    def _say(self, group: Group, name: str, what: str, hint: str = "") -> None:
        self.told.add(name)
        names = self.said[group].setdefault(" ".join(what.split()), [])
        shown = (name if group == Group.LEFT_OUT else self._shown(name)) + hint
        if shown not in names:
            names.append(shown)

    def _shown(self, name: str) -> str:
        """A key with its value, where the value is short."""
        value = self.keys.values.get(name)
        text = brief(value)
        return name if value is None or text.endswith("...") else f"{name}: {text}"


def _filled(value: Any) -> Any:
    """`${NAME}` in a text, which a shell or a script filled in, as a value of the environment."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items()}
    return re.sub(r"\$\{(\w+)\}", r"${oc.env:\1}", value) if isinstance(value, str) else value


def name_of(text: str) -> str:
    """A text as the name of a source or pipeline: letters, digits, _ and -."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_-") or "rows"
