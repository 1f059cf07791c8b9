"""Tokenized rows as arrays: facts about each row in memory, the tokens themselves memory-mapped."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from smolpost.chat.fates import Fate


class Tokens:
    """N tokenized rows, memory-mapped if they come from files.

    A token is addressed by its position in the concatenation of all rows. Only parts of it are ever in memory.

    Args:
        batches: Of `tokenize.SCHEMA`, in order.
    Attributes:
        offsets: [N + 1] int64: row i is the tokens from offsets[i] to offsets[i + 1].
        parts: [N, P] int64 tokens of each part of a row: P = 1 for documents, 3 for pairs, 2 for completions, 4
            for labelled ones.
        fate_counts: [N, len(Fate)] int64.
        path: [N] str.
        number, unknown, neutralised, content, is_text, think: [N], as in `tokenize.SCHEMA`.
        features: [N] bytes or None.
        unread: [N] lists of str, the row's keys that are not read.
        notes: [N] lists of str, notes on the row's rendering.
        faults: Refused row -> reason; such a row has no tokens.
    """

    def __init__(self, batches: list[pa.RecordBatch]):
        self._ids = [batch.column("ids").flatten().to_numpy() for batch in batches]
        self._fates = [batch.column("fates").flatten().to_numpy() for batch in batches]
        sizes = [len(ids) for ids in self._ids]
        self._block_starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))[:-1]
        table = pa.Table.from_batches(batches)
        lengths = np.concatenate([batch.column("ids").value_lengths().to_numpy() for batch in batches])
        self.offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        self.parts = values(table, "parts").reshape(len(lengths), -1).astype(np.int64)
        self.fate_counts = values(table, "fate_counts").reshape(-1, len(Fate))
        self.path = np.array(table["path"].to_pylist(), object)
        for name in ("number", "unknown", "neutralised", "content", "is_text", "think"):
            setattr(self, name, table[name].to_numpy())
        self.features = table["features"]
        self.unread, self.notes = table["unread"], table["notes"]
        fault = table["fault"]
        self.faults = {row: fault[row].as_py() for row in np.flatnonzero(fault.is_valid().to_numpy()).tolist()}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """[N] tokens of each row, all parts together."""
        return np.diff(self.offsets)

    def where(self, row: int) -> str:
        """PATH:NUMBER of a row, for messages."""
        return f"{self.path[row]}:{self.number[row]}"

    def pieces(self, starts: np.ndarray, stops: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Views of the ids and fates from each start to its stop, both in the same row."""
        blocks = np.searchsorted(self._block_starts, starts, side="right") - 1
        first = self._block_starts[blocks]
        spans = list(zip(blocks.tolist(), (starts - first).tolist(), (stops - first).tolist(), strict=True))
        ids = [self._ids[block][start:stop] for block, start, stop in spans]
        return ids, [self._fates[block][start:stop] for block, start, stop in spans]

    def fates_at(self, places: np.ndarray) -> np.ndarray:
        """[D] int8 fate of the token at each place."""
        blocks = np.searchsorted(self._block_starts, places, side="right") - 1
        fates = np.empty(len(places), np.int8)
        for block in np.unique(blocks):
            here = blocks == block
            fates[here] = self._fates[block][places[here] - self._block_starts[block]]
        return fates


def open_tokens(files: list[Path]) -> Tokens:
    """The rows of token files, one after another."""
    batches = []
    for file in files:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
    return Tokens(batches)


def values(table: pa.Table, column: str) -> np.ndarray:
    """All elements of a list column, one list after another."""
    return np.concatenate([chunk.flatten().to_numpy() for chunk in table[column].chunks])
