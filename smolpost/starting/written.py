"""The pipeline as a commented YAML file."""

import re
from dataclasses import dataclass, field
from typing import Any

from smolpost.importing.written import yaml_value
from smolpost.recipe.places import PACKAGE
from smolpost.screen import command_line
from smolpost.starting.choices import Setting

WIDTH = 118  # of a line with its comment; longer comments stand above their value


@dataclass
class Pipeline:
    """
    Attributes:
        name: Of the pipeline.
        about: What it does, in a line.
        defaults: (entry of the defaults list, its comment).
        settings: Full keys; values and reasons.
    """

    name: str
    about: str
    defaults: list[tuple[str, str]] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)

    def set(self, key: str, value: Any, why: str = "") -> None:
        self.settings.append(Setting(key, value, why))

    def text(self) -> str:
        """The file's text."""
        lines = [
            PACKAGE,
            f"# {self.about}",
            *(f"#   {command_line(['smolpost', verb, f'pipeline={self.name}'])}" for verb in ("plan", "run")),
            "# Change values here, or for one run by their full keys: stages.STAGE.learning_rate=1e-5",
            "defaults:",
            *(_line(f"  - {entry}", why) for entry, why in self.defaults),
            "  - _self_",
        ]
        tree: dict[str, Any] = {}
        for setting in self.settings:
            *path, last = setting.key.split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = setting
        return "\n".join([*lines, *_lines(tree, ""), ""])


def _lines(tree: dict[str, Any], indent: str):
    for key, node in tree.items():
        if isinstance(node, Setting):
            yield _line(f"{indent}{key}: {_value(node.value)}", node.why)
        else:
            yield f"{indent}{key}:"
            yield from _lines(node, f"{indent}  ")


def _value(value: Any) -> str:
    """As recipes write it: 1e-5, not 1.0e-05."""
    return re.sub(r"e-0(\d)", r"e-\1", f"{value:g}") if isinstance(value, float) else yaml_value(value)


def _line(text: str, why: str) -> str:
    if not why:
        return text
    beside = f"{text}   # {why}"
    indent = text[: len(text) - len(text.lstrip())]
    return beside if len(beside) <= WIDTH else f"{indent}# {why}\n{text}"
