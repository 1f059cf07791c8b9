"""What a row is, and how it is read from JSON: strictly, with whatever is not JSON refused by its place."""

import json
import math
import re
import sys

from smolpost.errors import UserError

MAX_DEPTH = 100  # levels of lists and objects in a row; what renders and compares rows goes a level at a time


class Row(dict):
    """A row that remembers where it was read, for error messages.

    Attributes:
        path: File, folder or Hub id.
        number: Row in it (JSONL: line), from 1.
        fault: Why the row cannot be read or used, with its place; None for a good row.
        unread: Its keys that are not read; those of its turns as messages.KEY.
    """

    __slots__ = ("fault", "number", "path", "unread")

    def __init__(
        self, content: dict, path: str, number: int, *, fault: str | None = None, unread: tuple[str, ...] = ()
    ):
        super().__init__(content)
        self.path = path
        self.number = number
        self.fault = fault
        self.unread = unread

    @property
    def where(self) -> str:
        return f"{self.path}:{self.number}"

    def with_content(self, content: dict, unread: tuple[str, ...] = ()) -> "Row":
        """A row with other content from the same place."""
        return Row(content, self.path, self.number, fault=self.fault, unread=unread)


def without_nulls(value):
    """A row or value without the keys that hold null, at any depth: Arrow fills them in where rows differ, and files
    that were exported from it keep them. Text is not looked into."""
    if isinstance(value, dict):
        content = {key: without_nulls(part) for key, part in value.items() if part is not None}
        return value.with_content(content) if isinstance(value, Row) else content
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def parse_row(line: bytes, where: str) -> dict:
    """A line of JSON as the object it holds.

    Raises:
        UserError: It is not UTF-8, no JSON as `parse_json` reads it, or no object.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: is not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}: Latin-1 or "
            "Windows-1252?); save it as UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8`"
        ) from error
    if text.startswith("\ufeff"):
        raise UserError(f"{where}: has a byte order mark in the middle of the file; remove it")
    expected = "expected one JSON object per line, or a list of objects as the whole file"
    row = parse_json(text, where, expected)
    if not isinstance(row, dict):
        raise UserError(f"{where}: is a JSON {kind_of(row).split()[-1]}; {expected}")
    return row


def parse_json(text: str, where: str, expected: str = "expected JSON"):
    """A JSON value. Refused are also duplicate keys, NaN, infinite numbers, halves of surrogate pairs, integers that
    Python does not convert and nesting beyond MAX_DEPTH.

    Raises:
        UserError: Names where and what was found; also `expected` if the text is not JSON.
    """
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is not JSON ({error.msg} at column {error.pos + 1}); {expected}") from error
    except UserError as error:  # of the hooks, which do not know the place
        raise UserError(f"{where}: {error}") from error
    except ValueError as error:
        limit = sys.get_int_max_str_digits()
        raise UserError(f"{where}: holds an integer of more than {limit} digits; write it as a string") from error
    except RecursionError as error:
        raise UserError(too_deep(where)) from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        check_depth(value, where)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        check_surrogates(value, where)
    return value


def unique_keys(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"holds the key {twice!r:.80} twice in one object; keep one of them")
    return found


def refuse_constant(name: str):
    raise UserError(f"holds {name}, which is not JSON; write null, a number or a string")


def finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise UserError(f"holds the number {digits:.40}, which is too large for a float; write it as a string")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=refuse_constant, parse_float=finite)


def check_surrogates(value, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(
            f"{where}: holds {half}, half of a surrogate pair, which is not a character; remove it or write both halves"
        ) from error


def check_depth(value, where: str) -> None:
    """
    Raises:
        UserError: Lists and objects are nested beyond MAX_DEPTH.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for outer in level
            for part in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise UserError(too_deep(where))


def too_deep(where: str) -> str:
    return f"{where}: is nested more than {MAX_DEPTH} levels deep; flatten it, or write the inner part as text"


def check_size(num_bytes: int, limit: int, where: str) -> None:
    """
    Raises:
        UserError: A row has more bytes than its source's limit.
    """
    if num_bytes > limit:
        raise UserError(
            f"{where}: has {num_bytes:,} bytes, above max_row_bytes={limit:,}; split the row, check that each row ends "
            "with a line break, or raise max_row_bytes of its source"
        )


def kind_of(value) -> str:
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
