"""JSON files that hold one list of rows, as LLaMA-Factory's do: cut into slices that any process can read."""

import io
import json
import re
from collections.abc import Iterator

from smolpost.data.rows import Row, check_size, kind_of, parse_json
from smolpost.data.source_slice import SourceSlice
from smolpost.errors import UserError

PEEKED = 4096  # bytes in which a list must begin
SPACE = " \t\n\r"
PLAIN = (
    json.JSONDecoder()
)  # finds where a value ends; what `parse_json` refuses in it is the row's fault, not the file's


MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)  # strings and brackets


def begins_list(file: io.BufferedReader) -> bool:
    """Whether the text from here on is a list; the file stays at it, or at white space before it."""
    return file.peek(PEEKED).lstrip()[:1] == b"["


def cut_list(
    content: bytes, path: str, begin: int, skip: int, stop: int, rows_per_slice: int
) -> tuple[list[SourceSlice], int]:
    """Slices of the rows from skip to stop, and the number of rows.

    Args:
        content: Of the file from byte `begin` on.
    Raises:
        UserError: It is not a JSON list.
    """
    text = decoded(content, path)
    found, edges, place, offset, count = [], [], 0, begin, 0
    for first, end in elements(text, path):
        offset += len(text[place:first].encode())
        if skip <= count < stop and (count - skip) % rows_per_slice == 0:
            edges.append((count, offset))
        offset += len(text[first:end].encode())
        place, count = end, count + 1
        if skip < count <= stop:
            last = (count, offset)
    for i, (row, start) in enumerate(edges):
        after, finish = edges[i + 1] if i + 1 < len(edges) else last
        found.append(SourceSlice(path, "", start, finish, row + 1, row, after - row))
    return found, count


def count_elements(content: bytes, path: str) -> int:
    """The rows of a whole file's bytes."""
    return sum(1 for _ in elements(decoded(content, path), path))


def list_rows(content: bytes, path: str, limit: int, number: int = 1, *, inside: bool = False) -> Iterator[Row]:
    """The rows of a whole file's bytes, or of a slice's.

    Args:
        limit: Bytes of a row, above which it is refused.
        number: Of the first row, from 1.
        inside: The bytes are a slice, between the list's brackets.
    """
    text = decoded(content, path)
    for i, (first, end) in enumerate(elements(text, path, inside), start=number):
        yield element_row(text[first:end], limit, path, i)


def element_row(text: str, limit: int, path: str, number: int) -> Row:
    where = f"{path}:{number}"
    try:
        check_size(len(text.encode()), limit, where)
        row = parse_json(text, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: is a JSON {kind_of(row).split()[-1]}; expected an object in the list")
    except UserError as error:
        return Row({}, path, number, fault=str(error))
    return Row(row, path, number)


def elements(text: str, path: str, inside: bool = False) -> Iterator[tuple[int, int]]:
    """Where each element of a list, or of the values between its brackets, begins and ends."""
    place, number = skipped(text, 0), 1
    place = place if inside else skipped(text, place + 1)
    while place < len(text) and text[place] != "]":
        try:
            _, end = PLAIN.raw_decode(text, place)
        except RecursionError:  # the row's fault
            end = closing(text, place)
        except ValueError as error:
            raise UserError(f"{path}:{number}: is not JSON ({error}); expected a list of objects") from error
        yield place, end
        place, number = skipped(text, end), number + 1
        if text[place : place + 1] == ",":
            place = skipped(text, place + 1)
        elif text[place : place + 1] != "]" and not (inside and place == len(text)):
            raise UserError(
                f"{path}:{number - 1}: is followed by {text[place : place + 20]!r}; expected , or the ] of a list"
            )
    if not inside and text[place + 1 :].strip(SPACE):
        raise UserError(f"{path}: continues after its list; expected one list, or one object per line")


def closing(text: str, place: int) -> int:
    """Where a list or object ends, by its brackets."""
    depth = 0
    for mark in MARKS.finditer(text, place):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(mark[0], 0)
        if not depth:
            return mark.end()
    return len(text)


def skipped(text: str, place: int) -> int:
    while place < len(text) and text[place] in SPACE:
        place += 1
    return place


def decoded(content: bytes, path: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8, for example with "
            "`iconv -f WINDOWS-1252 -t UTF-8`"
        ) from error
