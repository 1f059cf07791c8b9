"""A slice of a source: the unit in which its rows are counted, distributed to processes and read."""

import itertools
from dataclasses import dataclass, replace

ANY_NUMBER = 2**60  # of rows or bytes: no limit


@dataclass(frozen=True)
class SourceSlice:
    """Neighbouring rows of one file, folder or Hub dataset.

    Attributes:
        path: File, folder of one Arrow dataset, or Hub id.
        kind: "jsonl", "compressed", "parquet", "arrow" or "hub".
        begin, end: Its place in the path: bytes of a jsonl file, else rows, from 0.
        line: Line or row of the path at which it begins, from 1.
        first: Index of its first row among the rows that `read_rows` gives, from 0.
        num_rows: At least 1.
    """

    path: str
    kind: str
    begin: int
    end: int
    line: int
    first: int
    num_rows: int


def cut_rows(path: str, edges: list[int]) -> list[SourceSlice]:
    """The slices between neighbouring edges, which are rows of the path."""
    return [
        SourceSlice(path, "", begin, end, begin + 1, 0, end - begin)
        for begin, end in itertools.pairwise(edges)
        if begin < end
    ]


def joined(slices: list[SourceSlice], max_rows: int) -> list[SourceSlice]:
    """The same rows in fewer slices: neighbours of one path are joined up to max_rows rows."""
    found: list[SourceSlice] = []
    for part in slices:
        last = found[-1] if found else None
        if last and last.path == part.path and last.num_rows + part.num_rows <= max_rows:
            found[-1] = replace(last, end=part.end, num_rows=last.num_rows + part.num_rows)
        else:
            found.append(part)
    return found
