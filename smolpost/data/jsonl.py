"""JSONL files, also compressed ones: cut into slices by their line ends, without parsing, and read line by line, so
that each row keeps exactly the keys it was written with. A file that is one list of rows is read by `json_list`."""

import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from smolpost.data.json_list import begins_list, count_elements, cut_list, list_rows
from smolpost.data.paths import COMPRESSIONS, readable
from smolpost.data.rows import Row, check_size, parse_row
from smolpost.data.source_slice import ANY_NUMBER, SourceSlice, cut_rows
from smolpost.errors import UserError
from smolpost.schema import Source

WINDOW_BYTES = 4 * 2**20  # of a file searched for line ends at a time
IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\x0b\x0c"))  # what bytes.strip() removes
UTF8_BOM = b"\xef\xbb\xbf"
OTHER_BOMS = {  # the longer ones first: UTF-32's begins with UTF-16's
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
    b"{\x00": "UTF-16", b"\x00{": "UTF-16",
}  # fmt: skip


def cut_jsonl(source: Source, path: str, skip: int, stop: int, rows_per_slice: int) -> tuple[list[SourceSlice], int]:
    """Pieces of the rows from skip to stop, and the number of rows found up to stop."""
    with readable(path, "text file", "check its permissions"), open(path, "rb") as file:
        begin = text_begin(file.read(4), path)
        file.seek(begin)
        if begins_list(file):
            return cut_list(file.read(), path, begin, skip, stop, rows_per_slice)
        edges = [(0, begin, 1)] if not skip else []
        count, last = 0, None
        for ends, lines in row_ends(file, begin):
            rows = count + 1 + np.arange(len(ends))
            cut = (rows >= skip) & (rows <= stop) & (((rows - skip) % rows_per_slice == 0) | (rows == stop))
            edges += zip(rows[cut].tolist(), ends[cut].tolist(), lines[cut].tolist(), strict=True)
            count, last = count + len(ends), (int(ends[-1]), int(lines[-1]))
            if count >= stop:
                break
    if edges and edges[-1][0] < min(count, stop):
        edges.append((count, *last))
    found = [
        SourceSlice(path, "jsonl", begin, end, line, row, after - row)
        for (row, begin, line), (after, end, _) in itertools.pairwise(edges)
    ]
    return found, count


def cut_compressed(
    source: Source, path: str, skip: int, stop: int, rows_per_slice: int
) -> tuple[list[SourceSlice], int]:
    with uncompressed(path) as file:
        count = 0
        if begins_list(file):
            count = count_elements(file.read(), path)
            return cut_rows(path, [skip, min(count, stop)]), count
        for ends, _ in row_ends(file, 0):
            count += len(ends)
            if count >= stop:
                break
    return cut_rows(path, [skip, min(count, stop)]), count


def row_ends(file, begin: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Where the rows end: lines that are not blank.

    Args:
        begin: The file's place, bytes.
    Yields:
        Of some rows each, at least one: [R] int64 the byte after the row's line, [R] int64 the number of the next line.
    """
    offset, lines_before, open_is_blank = begin, 0, True
    while window := file.read(WINDOW_BYTES):
        text = np.frombuffer(window, np.uint8)
        ends = np.flatnonzero(text == ord("\n")) + 1
        begins = np.concatenate(([0], ends))  # of the lines, the last one open to the next window
        # Hardly a row begins with a space, so one byte of each line tells nearly always that it is not blank; an open
        # line without a byte takes the line end before it, a space too.
        blank = IS_SPACE[text[np.minimum(begins, len(text) - 1)]]
        for i in np.flatnonzero(blank):
            blank[i] = not window[begins[i] : begins[i + 1] if i < len(ends) else None].strip()
        blank[0] &= open_is_blank
        open_is_blank = bool(blank[-1])
        rows = np.flatnonzero(~blank[:-1])
        if len(rows):
            yield offset + ends[rows], lines_before + rows + 2
        offset += len(window)
        lines_before += len(ends)
    if not open_is_blank:
        yield np.array([offset]), np.array([lines_before + 2])


def jsonl_rows(source: Source, part: SourceSlice) -> Iterator[Row]:
    with open(part.path, "rb") as file:
        file.seek(text_begin(file.read(4), part.path))
        as_list = begins_list(file)
        file.seek(part.begin)
        if as_list:
            content = file.read(part.end - part.begin)
            yield from list_rows(content, part.path, source.max_row_bytes, part.line, inside=True)
        else:
            yield from parsed_rows(file, part.path, source.max_row_bytes, part.line, part.end - part.begin)


def compressed_rows(source: Source, part: SourceSlice) -> Iterator[Row]:
    with uncompressed(part.path) as file:
        if begins_list(file):
            rows = list_rows(file.read(), part.path, source.max_row_bytes)
            yield from itertools.islice(rows, part.begin, part.end)
            return
        yield from parsed_rows(
            file, part.path, source.max_row_bytes, 1, ANY_NUMBER, skip=part.begin, most=part.num_rows
        )


def parsed_rows(
    file, path: str, limit: int, line: int, num_bytes: int, *, skip: int = 0, most: int = ANY_NUMBER
) -> Iterator[Row]:
    """The rows of the next num_bytes without the first `skip`, at most `most`.

    Args:
        limit: Bytes of a row, above which it is refused.
        line: Number of the first line.
    """
    while most and num_bytes > 0:
        text, size = read_line(file, limit)
        if not size:
            return
        num_bytes -= size
        if not text.isspace():
            if not skip:
                yield parsed_row(text, size, limit, path, line)
                most -= 1
            skip = max(0, skip - 1)
        line += 1


def read_line(file, limit: int) -> tuple[bytes, int]:
    """The next line, and its bytes with the line end; of one above the limit, some of its text alone."""
    text = file.readline(limit + 2)
    size, end = len(text), text[-1:]
    while size > limit + 1 and end not in (b"\n", b""):
        rest = file.readline(WINDOW_BYTES)
        size, end = size + len(rest), rest[-1:]
        text = rest if text.isspace() else text
    return text, size


def parsed_row(text: bytes, size: int, limit: int, path: str, line: int) -> Row:
    """The row of a line, or its fault."""
    try:
        check_size(size - text.endswith(b"\n"), limit, f"{path}:{line}")
        return Row(parse_row(text, f"{path}:{line}"), path, line)
    except UserError as error:
        return Row({}, path, line, fault=str(error))


def text_begin(start: bytes, path: str) -> int:
    """Bytes of the UTF-8 byte order mark at the start of a file, 0 or 3."""
    for mark, name in OTHER_BOMS.items():
        if start.startswith(mark):
            raise UserError(f"{path}: is {name}; save it as UTF-8, for example with `iconv -f {name} -t UTF-8`")
    return len(UTF8_BOM) if start.startswith(UTF8_BOM) else 0


@contextmanager
def uncompressed(path: str) -> Iterator[io.BufferedReader]:
    """The text of a compressed file, after its byte order mark."""
    compression = COMPRESSIONS[Path(path).suffix]
    with readable(path, "complete compressed file", "compress it again"), pa.input_stream(path, compression) as stream:
        file = io.BufferedReader(stream, WINDOW_BYTES)
        file.read(text_begin(file.peek(4)[:4], path))
        yield file
