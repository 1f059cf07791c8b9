"""Parquet files, folders of `datasets.save_to_disk` and Hub datasets, cut into slices and read.

Their rows come with one schema for all, where a missing key is None; `sources.read_slice` removes those keys.
"""

import itertools
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from smolpost.data.paths import is_hub_id, one_line, readable
from smolpost.data.rows import Row, check_size, parse_json
from smolpost.data.source_slice import SourceSlice, cut_rows
from smolpost.errors import UserError
from smolpost.schema import Source

BATCH_BYTES = 16 * 2**20  # of Arrow data turned into rows at a time
PARQUET = ("Parquet file", "write it again")


def cut_dataset(source: Source, path: str, skip: int, stop: int, rows_per_slice: int) -> tuple[list[SourceSlice], int]:
    num_rows = len(opened_dataset(source, path, again=True))
    stop = min(stop, num_rows)
    return cut_rows(path, [*range(skip, stop, rows_per_slice), stop]), num_rows


def cut_parquet(source: Source, path: str, skip: int, stop: int, rows_per_slice: int) -> tuple[list[SourceSlice], int]:
    """Cut at row groups; small ones are joined, and those above rows_per_slice are cut into ranges."""
    with readable(path, *PARQUET), pq.ParquetFile(path) as file:
        ends = group_starts(file)[1:]
    edges = [skip]
    for begin, end in itertools.pairwise([skip, *(min(end, stop) for end in ends if end > skip)]):
        if end - edges[-1] > rows_per_slice and begin > edges[-1]:
            edges.append(begin)
        while end - edges[-1] > rows_per_slice:
            edges.append(edges[-1] + rows_per_slice)
    return cut_rows(path, [*edges, min(stop, ends[-1])] if ends else []), ends[-1] if ends else 0


def group_starts(file: pq.ParquetFile) -> list[int]:
    """First row of each row group, and the number of rows."""
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    return [0, *itertools.accumulate(sizes)]


def dataset_rows(source: Source, part: SourceSlice) -> Iterator[Row]:
    dataset = opened_dataset(source, part.path)
    table = dataset.data
    step = rows_at_a_time(table.nbytes, table.num_rows)
    dataset = dataset.with_format("arrow")  # undecoded: only then JSON columns can be told from others
    for begin in range(part.begin, min(part.end, len(dataset)), step):
        found = dataset[begin : min(begin + step, part.end)]
        yield from table_rows(found, part.path, begin + 1, source.max_row_bytes)


class ParquetReader:
    """The rows of one file, forward only, from the start of the row group that holds a row."""

    def __init__(self, path: str, row: int):
        self.file = pq.ParquetFile(path)
        self.starts = group_starts(self.file)
        groups = range(self.group_of(row), self.file.metadata.num_row_groups)
        size = sum(self.file.metadata.row_group(i).total_byte_size for i in groups)
        step = rows_at_a_time(size, self.starts[-1] - self.starts[groups[0]])
        self.batches = self.file.iter_batches(step, row_groups=list(groups), use_threads=False)
        self.begin = self.end = self.starts[groups[0]]  # rows of the current batch
        self.batch = None

    def group_of(self, row: int) -> int:
        return min(bisect_right(self.starts, row), len(self.starts) - 1) - 1

    def leads_to(self, row: int) -> bool:
        """Whether reading on reaches the row without decoding more than a reader that starts at its row group."""
        return self.begin <= row and self.starts[self.group_of(row)] <= self.end

    def slices(self, begin: int, end: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(first row, rows) of each part of the range."""
        while begin < min(end, self.starts[-1]):
            while self.end <= begin:
                self.batch = next(self.batches)
                self.begin, self.end = self.end, self.end + len(self.batch)
            found = self.batch.slice(begin - self.begin, end - begin)
            yield begin, found
            begin += len(found)


# A reader stays open between slices of one process: otherwise each of the slices of a large row group would decode the
# group from its start.
_parked: dict[tuple, ParquetReader] = {}


def parquet_rows(source: Source, part: SourceSlice) -> Iterator[Row]:
    with readable(part.path, *PARQUET):
        stat = os.stat(part.path)
        key = (os.getpid(), part.path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        reader = _parked.pop(key, None)
        if reader is None or not reader.leads_to(part.begin):
            reader = ParquetReader(part.path, part.begin)
        for begin, batch in reader.slices(part.begin, part.end):
            yield from table_rows(batch, part.path, begin + 1, source.max_row_bytes)
        _parked.clear()
        _parked[key] = reader


def rows_at_a_time(num_bytes: int, num_rows: int) -> int:
    return max(1, min(1024, BATCH_BYTES * num_rows // max(1, num_bytes)))


def table_rows(table: pa.Table | pa.RecordBatch, path: str, number: int, limit: int) -> Iterator[Row]:
    """The table's rows; one that cannot be read says why.

    Args:
        number: Of its first row.
        limit: Bytes of a row, above which it is refused.
    """
    try:
        check_size(table.nbytes, limit, f"{path}:{number}")
        rows = table.to_pylist(maps_as_pydicts="strict")
    except (UserError, UnicodeDecodeError, KeyError) as error:
        if len(table) > 1:  # by halves, to find the row
            half = len(table) // 2
            yield from table_rows(table.slice(0, half), path, number, limit)
            yield from table_rows(table.slice(half), path, number + half, limit)
            return
        fault = str(error)
        if not isinstance(error, UserError):
            found = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else "a map with a key twice"
            fault = f"{path}:{number}: holds {found} ({one_line(error)}); write the row again"
        yield Row({}, path, number, fault=fault)
        return
    readers = {field.name: reader for field in table.schema if (reader := json_reader(field.type))}
    for i, row in enumerate(rows, start=number):
        try:
            read = {name: reader(row[name], f"{path}:{i}") for name, reader in readers.items()}
            yield Row(row | read, path, i)
        except UserError as error:
            yield Row({}, path, i, fault=str(error))


def json_reader(kind: pa.DataType) -> Callable | None:
    """What reads the JSON columns inside a value of this type, given the value and its place; None without any."""
    if isinstance(kind, pa.JsonType):
        return lambda value, where: None if value is None else parse_json(value, where)
    if pa.types.is_struct(kind):
        readers = {field.name: reader for field in kind if (reader := json_reader(field.type))}
        return readers and (lambda value, where: value and value | {k: r(value[k], where) for k, r in readers.items()})
    if pa.types.is_map(kind):
        inner = json_reader(kind.item_type)
        return inner and (lambda value, where: value and {key: inner(item, where) for key, item in value.items()})
    if hasattr(kind, "value_type") and not pa.types.is_dictionary(kind) and (inner := json_reader(kind.value_type)):
        return lambda value, where: value and [inner(item, where) for item in value]
    return None


_datasets: dict[tuple, object] = {}  # the last one opened; forked processes share it, as it is memory-mapped


def opened_dataset(source: Source, path: str, again: bool = False):
    """The Dataset of a folder of save_to_disk or of a Hub id.

    Args:
        again: Open it anew, as its files may have changed.
    """
    import datasets  # takes a second, and files need none of it

    key = (path, source.subset, source.split, source.revision)
    if again or key not in _datasets:
        try:
            if is_hub_id(source):
                dataset = datasets.load_dataset(path, source.subset, split=source.split, revision=source.revision)
            else:
                dataset = datasets.load_from_disk(path)
        except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
            # No such id, subset or split; a script; no network; a damaged folder.
            raise UserError(
                f"{path}: cannot be read as a file, folder or Hub dataset (subset {source.subset}, split "
                f"{source.split}, revision {source.revision}): {one_line(error)}; check path, names, HF_TOKEN and "
                "network"
            ) from error
        _datasets.clear()
        _datasets[key] = dataset
    return _datasets[key]
