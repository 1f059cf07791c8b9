"""Sources read whole and in pieces, for the tests of every kind of file."""

import pickle
from itertools import accumulate

import datasets

from smolpost.data.source_slice import SourceSlice
from smolpost.data.sources import read_rows, read_slice, slices
from smolpost.schema import Source

ROWS = [{"text": "one"}, {"text": "two", "extra": 2}, {"text": "three"}]


def read(path, **settings):
    return list(read_rows(Source(path=str(path), **settings)))


def check_slices(source: Source, rows_per_slice: int, expected: list[dict], whole: bool = False) -> list[SourceSlice]:
    """The pieces hold the expected rows once and in order, whatever order they are read in."""
    cut = slices(source, rows_per_slice)
    assert [piece.first for piece in cut] == list(accumulate([0] + [piece.num_rows for piece in cut]))[:-1]
    assert whole or max(piece.num_rows for piece in cut) <= rows_per_slice
    assert pickle.loads(pickle.dumps(cut)) == cut
    backwards = [list(read_slice(source, piece)) for piece in reversed(cut)][::-1]
    assert [len(rows) for rows in backwards] == [piece.num_rows for piece in cut]
    forwards = [row for piece in cut for row in read_slice(source, piece)]
    assert [row for rows in backwards for row in rows] == forwards == expected
    assert [(row.number, row) for row in forwards] == list(read_rows(source))
    return cut


def saved(folder, rows=3):
    datasets.Dataset.from_list([{"text": f"{folder.name} {i}"} for i in range(rows)]).save_to_disk(folder)
    return [{"text": f"{folder.name} {i}"} for i in range(rows)]
