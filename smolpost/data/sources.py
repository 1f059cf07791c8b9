"""Rows from files, folders and the Hub, in slices that any process can read, and a hash of their content."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from glob import has_magic
from pathlib import Path

from smolpost.data.arrow_rows import cut_dataset, cut_parquet, dataset_rows, parquet_rows
from smolpost.data.jsonl import compressed_rows, cut_compressed, cut_jsonl, jsonl_rows
from smolpost.data.paths import is_hub_id, parts, saved_entry
from smolpost.data.rows import Row, without_nulls
from smolpost.data.source_slice import ANY_NUMBER, SourceSlice
from smolpost.errors import UserError
from smolpost.files import sha256
from smolpost.schema import Source

READ_ROWS = 4096  # of a slice, when one process reads all of a source
CUTTERS = {
    "jsonl": cut_jsonl, "compressed": cut_compressed, "parquet": cut_parquet, "arrow": cut_dataset, "hub": cut_dataset,
}  # fmt: skip
READERS = {
    "jsonl": jsonl_rows, "compressed": compressed_rows, "parquet": parquet_rows, "arrow": dataset_rows,
    "hub": dataset_rows,
}  # fmt: skip


def read_rows(source: Source, *, faults: bool = False) -> Iterator[tuple[int, Row]]:
    """The rows of a source from first_row on, at most max_rows.

    Args:
        faults: Also yield rows that cannot be read; their `fault` says why.
    Yields:
        (number, row), number as in Row.
    Raises:
        UserError: As `slices` and `read_slice`, or a row cannot be read.
    """
    for part in slices(source, READ_ROWS):
        for row in read_slice(source, part):
            if row.fault and not faults:
                raise UserError(row.fault)
            yield row.number, row


def slices(source: Source, rows_per_slice: int) -> list[SourceSlice]:
    """The rows of a source from first_row on, at most max_rows, cut into slices; together they are all rows in order.

    A path is a JSONL (also .gz, .zst) or Parquet file, a pattern for such files, a folder of `datasets.save_to_disk`,
    a folder of such files, or a Hub id, if it is relative. Nothing is parsed; JSONL is searched for line ends.

    Args:
        rows_per_slice: Rows of a slice, at most. A compressed file is one slice: reading cannot start in its middle.
    Raises:
        UserError: The path or split does not exist, a file is empty or not JSONL or Parquet, or no row is left.
    """
    if source.first_row < 0 or (source.max_rows is not None and source.max_rows < 1):
        raise UserError(
            f"{source.path}: first_row={source.first_row}, max_rows={source.max_rows}; "
            "expected first_row >= 0 and max_rows >= 1 or null"
        )
    skip, left = source.first_row, ANY_NUMBER if source.max_rows is None else source.max_rows
    found, first = [], 0
    for path, kind in parts(source):
        cut, num_rows = CUTTERS[kind](source, path, skip, skip + left, rows_per_slice)
        if not num_rows:
            raise UserError(f"{path}: is empty; expected at least one row; delete the file or write it again")
        for part in cut:
            found.append(replace(part, kind=kind, first=first))
            first += part.num_rows
            left -= part.num_rows
        skip = max(0, skip - num_rows)
        if not left:
            break
    if not found:
        raise UserError(f"{source.path}: no row is left from first_row={source.first_row} on; lower first_row")
    return found


def read_slice(source: Source, part: SourceSlice) -> Iterator[Row]:
    """The rows of one slice, without the keys that have null; `Row.fault` says why a row cannot be read.

    Raises:
        UserError: The file is truncated, or its number of rows has changed.
    """
    num_rows = 0
    for row in READERS[part.kind](source, part):
        num_rows += 1
        yield without_nulls(row)
    if num_rows != part.num_rows:
        raise UserError(
            f"{part.path}: has {num_rows} rows from row {part.line} on, but {part.num_rows} were counted: "
            "the file was changed while it was read; run again"
        )


def fingerprint(source: Source, hashed: Callable[[Path], str] = sha256) -> str:
    """A name for the content of a source.

    For a Hub dataset, `id@revision/subset/split`. For a file, the SHA-256 of its bytes. For a folder or a pattern, the
    SHA-256 of the names (relative to the folder, or to the pattern's fixed part) and the bytes of all files that are
    read. The choice of rows (first_row, max_rows) and the mapping of columns are not part of it.

    Args:
        hashed: SHA-256 of a file's content: `files.Hashes`, where a content shall be read once and not each time.
    Raises:
        UserError: The path or split does not exist.
    """
    if is_hub_id(source):
        return f"{source.path}@{source.revision or 'main'}/{source.subset or 'default'}/{source.split}"
    if Path(source.path).is_file():
        return hashed(Path(source.path))
    root = Path(*itertools.takewhile(lambda part: not has_magic(part), Path(source.path).parts))
    if Path(source.path).is_dir():
        root = Path(source.path)
    digest = hashlib.sha256()
    for path, kind in parts(source):
        for file in arrow_files(Path(path)) if kind == "arrow" else [Path(path)]:
            digest.update(f"{file.relative_to(root)}\0{hashed(file)}\n".encode())
    return digest.hexdigest()


def arrow_files(folder: Path) -> list[Path]:
    """The data files of a folder of save_to_disk, without the caches that map() leaves beside them."""
    return [folder / file["filename"] for file in saved_entry(folder / "state.json", "_data_files")]
