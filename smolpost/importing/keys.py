"""The keys of a file, each read once and as the type that its tool takes."""

import json
import math
from pathlib import Path
from typing import Any

from smolpost.errors import UserError
from smolpost.screen import shown

KINDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a mapping",
}  # fmt: skip


class Keys:
    """A mapping of a file that knows which of its keys have been read.

    Args:
        where: Before a key in messages, e.g. "datasets[0].".
    """

    def __init__(self, values: dict[str, Any], file: Path, where: str = ""):
        self.values, self.file, self.where = values, file, where
        self.read: set[str] = set()

    def given(self, name: str) -> bool:
        """Whether the key has a value; null counts as missing."""
        return self.values.get(name) is not None

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """The key's value as this type, or the default where it has none. Text that holds a number is a number, as for
        the tools: YAML reads 2e-5 as text.

        Raises:
            UserError: The value is of another type.
        """
        self.read.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        try:
            return _CONVERSIONS[kind](value)
        except (TypeError, ValueError, KeyError, OverflowError):
            remedy = f"write {KINDS[kind]}"
            if isinstance(value, str) and "${" in value:
                remedy = "write the value that it stood for"
            raise UserError(
                f"{shown(self.file)}: {self.where}{name}={brief(value)} is not {KINDS[kind]}; {remedy}"
            ) from None

    def numbers(self, name: str) -> list[float]:
        """The numbers of a list.

        Raises:
            UserError: It holds something else.
        """
        items = Keys(dict(enumerate(self.take(name, list, []))), self.file, f"{self.where}{name}.")
        return [items.take(i, float, math.nan) for i in items.values]

    def mappings(self, name: str) -> list["Keys"]:
        """The mappings of a list, or a single one.

        Raises:
            UserError: It holds something else.
        """
        if isinstance(self.values.get(name), dict):
            return [Keys(self.take(name, dict), self.file, f"{self.where}{name}.")]
        items = self.take(name, list, [])
        for i, item in enumerate(items):
            if not isinstance(item, dict):
                where = f"{shown(self.file)}: {self.where}{name}[{i}]"
                raise UserError(f"{where}={brief(item)} is not a mapping; write it as KEY: VALUE lines")
        return [Keys(item, self.file, f"{self.where}{name}[{i}].") for i, item in enumerate(items)]

    def unread(self) -> list[str]:
        """Keys with a value that nobody has asked for."""
        return [name for name, value in self.values.items() if value is not None and name not in self.read]


def brief(value: Any, width: int = 50) -> str:
    """A value in one short line."""
    text = json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    text = {True: "true", False: "false"}.get(value, text) if isinstance(value, bool) else " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def tidy(number: float) -> float:
    """A computed number without its rounding error: 0.2 for 4e-6 / 2e-5."""
    return float(f"{number:.12g}")


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]


def _text(value: Any) -> str:
    if isinstance(value, dict | list):
        raise ValueError
    return str(value)


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _mapping(value: Any) -> dict:
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise ValueError
    return found


_CONVERSIONS = {int: _whole, float: _number, bool: _truth, str: _text, list: _list, dict: _mapping, object: lambda v: v}
