"""A piece of a source: the unit in which its rows are counted, shared out among processes and read."""

import itertools
from dataclasses import dataclass

ANY_NUMBER = 2**60  # of rows or bytes: no limit


@dataclass(frozen=True)
class SourceSlice:
    """Neighbouring rows of one file, folder or Hub dataset.

    Attributes:
        path: File, folder of one Arrow dataset, or Hub id.
        kind: "jsonl", "compressed", "parquet", "arrow" or "hub".
        begin: Where the piece begins, and
        end: where it ends: bytes of a jsonl file, else rows of the path, from 0.
        line: Line or row of the path it begins at, from 1.
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
    """The pieces between neighbouring edges, rows of the path."""
    return [
        SourceSlice(path, "", begin, end, begin + 1, 0, end - begin)
        for begin, end in itertools.pairwise(edges)
        if begin < end
    ]
