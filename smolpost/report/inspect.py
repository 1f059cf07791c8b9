"""Reads a prepared folder as the model will see it: packs, pairs and completions with the fate of every token.

N rows read, T tokens of a document or part. The folder stays memory-mapped; only what is asked for is read.
"""

import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from smolpost.chat.fates import Fate
from smolpost.data.collate import PARTS
from smolpost.data.report import REPORT
from smolpost.errors import UserError
from smolpost.report.prepared_units import (
    Location,
    Pack,
    PackedDocument,
    PreparedCompletion,
    PreparedPair,
    PreparedRow,
    TokenSequence,
)

ROWS = "rows.parquet"
COMPLETION = ("prompt_ids", "prompt_fates", "completion_ids", "completion_mask", "completion_fates", "rows")
# The first layout whose columns a folder has is its layout.
COLUMNS = {
    "documents": ("input_ids", "fates", "seq_lengths", "rows"),
    "pairs": (*(f"{part}_{what}" for part in PARTS for what in ("ids", "mask", "fates")), "rows"),
    "labelled": (*COMPLETION, "label"),
    "completions": COMPLETION,
}
MOST_PARTS = 8  # tokens of one character, at most: bytes may never add up to one
UNFINISHED = "\ufffd"  # what a decoder gives for a part of a character
FILES = ("manifest.json", "state.json", "dataset_info.json", ROWS, REPORT, "tokenizer")


class Prepared:
    """A prepared folder, open for reading.

    Attributes:
        layout: "documents" (packs of them), "pairs", "labelled" (completions) or "completions".
        report: data_report.json.
        manifest: manifest.json.
    Raises:
        UserError: The folder is not a finished prepared folder.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder} is not a folder; give a folder that `smolpost prepare` finished")
        missing = [name for name in FILES if not (self.folder / name).exists()]
        if missing:
            raise UserError(
                f"{folder} is not a prepared folder: it has no {missing[0]}; give "
                "a folder that `smolpost prepare` finished"
            )
        self.manifest, self.report = self._json("manifest.json"), self._json(REPORT)
        try:
            self._data = datasets.load_from_disk(str(self.folder)).with_format("arrow")
        except Exception as error:  # whatever datasets and Arrow make of a damaged file
            raise self._damaged(f"its rows cannot be read ({error})") from error
        self.layout = next(
            (layout for layout, names in COLUMNS.items() if set(names) <= set(self._data.column_names)), ""
        )
        if not self.layout:
            raise self._damaged(f"its columns are {', '.join(self._data.column_names)}")

    def __len__(self) -> int:
        """Number of packs, pairs or completions."""
        return len(self._data)

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the tokenizer's added tokens, such as `<|im_start|>` and `<think>`."""
        return frozenset(self.tokenizer.added_tokens_decoder)

    # ------------------------------------------------------------ packs, pairs and completions

    def pack(self, index: int) -> Pack:
        """
        Raises:
            UserError: There is no such pack, or its columns contradict each other.
        """
        columns = self._columns(index, ("documents",), "pack")
        ids, fates, lengths, rows = (columns[name] for name in COLUMNS["documents"])
        if len(fates) != len(ids) or lengths.sum() != len(ids) or len(rows) != len(lengths):
            raise self._damaged(f"ids, fates and lengths of pack {index} contradict each other")
        starts = np.cumsum(lengths) - lengths
        documents = [
            PackedDocument(
                index,
                i,
                start,
                self.row(row),
                TokenSequence("document", 0, *(a[start : start + n] for a in (ids, fates))),
            )
            for i, (start, n, row) in enumerate(zip(starts.tolist(), lengths.tolist(), rows.tolist(), strict=True))
        ]
        return Pack(index, documents)

    def pair(self, index: int) -> PreparedPair:
        """
        Raises:
            UserError: There is no such pair, or its columns contradict each other.
        """
        columns = self._columns(index, ("pairs",), "pair")
        return PreparedPair(index, self.row(int(columns["rows"][0])), *self._parts(columns, PARTS, f"pair {index}"))

    def completion(self, index: int) -> PreparedCompletion:
        """
        Raises:
            UserError: There is no such completion, or its columns contradict each other.
        """
        columns = self._columns(index, ("labelled", "completions"), "completion")
        label = bool(columns["label"][0]) if "label" in columns else None
        parts = self._parts(columns, ("prompt", "completion"), f"completion {index}")
        return PreparedCompletion(index, self.row(int(columns["rows"][0])), label, *parts)

    def _parts(self, columns: dict[str, np.ndarray], names: tuple[str, ...], where: str) -> list[TokenSequence]:
        """The prompt, and what continues it."""
        parts, first = [], 0
        for name in names:
            ids, fates = columns[f"{name}_ids"], columns[f"{name}_fates"]
            mask = columns.get(f"{name}_mask", np.zeros(len(ids)))  # of a completion's prompt, which never trains
            if not np.array_equal(mask == 1, fates == Fate.TRAINED) or len(ids) != len(fates):
                raise self._damaged(f"mask and fates of {where}'s {name} contradict each other")
            parts.append(TokenSequence(name, first, ids, fates))
            first = len(parts[0].ids)
        return parts

    def _columns(self, index: int, layouts: tuple[str, ...], what: str) -> dict[str, np.ndarray]:
        if self.layout not in layouts:
            raise UserError(f"{self.folder} has {self.layout}, and no {what}s")
        if not 0 <= index < len(self):
            raise UserError(f"{what} {index} does not exist; {self.folder} has {what}s 0 to {len(self) - 1}")
        table = self._data[index]
        return {name: table.column(name).chunk(0).flatten().to_numpy() for name in table.column_names}

    def _json(self, name: str) -> dict:
        try:
            return json.loads((self.folder / name).read_text())
        except ValueError as error:
            raise self._damaged(f"{name} is not JSON ({error})") from error

    def _damaged(self, how: str) -> UserError:
        return UserError(f"{self.folder} is not a prepared folder: {how}; remove it and run `smolpost prepare` again")

    # ------------------------------------------------------------ rows and search

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        """Columns of rows.parquet, [N] each; texts as codes into `self._texts`, as most rows share a few."""
        texts = ["source", "path", "dropped"]
        table = pq.read_table(self.folder / ROWS, read_dictionary=texts).unify_dictionaries().combine_chunks()
        columns, self._texts = {}, {}
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            if name in texts:
                self._texts[name] = column.dictionary.to_pylist()
                column = column.indices
            columns[name] = column.to_numpy(zero_copy_only=False)
        return columns

    def row(self, index: int) -> PreparedRow:
        """A row by its index in rows.parquet."""
        columns = self._rows
        if not 0 <= index < len(columns["number"]):
            raise self._damaged(f"{ROWS} has no row {index}")
        source, path, dropped = (self._texts[name][columns[name][index]] for name in ("source", "path", "dropped"))
        number, tokens = int(columns["number"][index]), int(columns["tokens"][index])
        return PreparedRow(source, path, number, tokens, bool(columns["think"][index]), dropped)

    @property
    def sources(self) -> list[str]:
        """Names, in the order of the report."""
        return list(self.report["sources"])

    def find(self, source: str | None = None, row: str | None = None) -> np.ndarray:
        """Rows by source and place.

        Args:
            source: Its name, or None for all.
            row: "PATH:N" (the end of a path will do), "N" for row N of every path, or None for all.
        Returns:
            [N] bool: which rows fit; at least one of them was kept.
        Raises:
            UserError: No row fits, or all that do were dropped; says which sources there are, or the reason.
        """
        found = np.ones(len(self._rows["number"]), bool)
        if source is not None:
            if source not in self.sources:
                raise UserError(f"source {source!r} is not in {self.folder}; it has {', '.join(self.sources)}")
            found &= self._is("source", lambda text: text == source)
        if row is not None:
            path, _, number = row.rpartition(":")
            if not number.isdecimal():
                raise UserError(f"row {row!r} is neither PATH:N nor N, where N counts the rows of a file from 1")
            found &= self._rows["number"] == int(number)
            if path:
                found &= self._is("path", lambda text: text == path or text.endswith(f"/{path}"))
        asked = "".join([f"row {row}" if row is not None else "a row", f" of source {source}" if source else ""])
        if not found.any():
            raise UserError(f"{asked} is not in {self.folder}; {self._ranges(source)}")
        if not (found & self._kept).any():
            raise UserError(f"{asked} was dropped: {'; '.join(self.dropped(found))}")
        return found

    def dropped(self, rows: np.ndarray, limit: int = 10) -> list[str]:
        """ "PATH:N REASON" of the first `limit` dropped rows among those marked in [N] bool `rows`."""
        chosen = map(self.row, np.flatnonzero(rows & ~self._kept)[:limit].tolist())
        return [f"{row.place} {row.dropped}" for row in chosen]

    @property
    def _kept(self) -> np.ndarray:
        return self._is("dropped", lambda text: not text)

    def _is(self, column: str, test) -> np.ndarray:
        """[N] bool: rows whose text passes the test."""
        self._rows  # noqa: B018 - fills _texts
        passes = np.array([test(text) for text in self._texts[column]], bool)
        return passes[self._rows[column]]

    def _ranges(self, source: str | None) -> str:
        """Which rows there are, for a message."""
        chosen = self._is("source", lambda text: source in (None, text))
        paths, numbers = self._rows["path"][chosen], self._rows["number"][chosen]
        known = [
            f"{self._texts['path'][code]}:{numbers[paths == code].min()} to {numbers[paths == code].max()}"
            for code in np.unique(paths)[:5].tolist()
        ]
        return f"it has {', '.join(known) or 'none'}"

    def locate(self, rows: np.ndarray) -> Iterator[Location]:
        """The documents, pairs or completions of the rows in the folder's order.

        Args:
            rows: [N] bool.
        """
        done = 0
        for chunk in self._data.data.column("rows").chunks:
            values = chunk.flatten().to_numpy()
            ends = np.cumsum(chunk.value_lengths().to_numpy())
            hits = np.flatnonzero(rows[values])
            packs = np.searchsorted(ends, hits, side="right")
            starts = np.concatenate(([0], ends))
            for pack, hit in zip(packs.tolist(), hits.tolist(), strict=True):
                yield Location(done + pack, hit - int(starts[pack]), int(values[hit]))
            done += len(chunk)

    def first_by_thinking(self) -> dict[str, dict[bool, Location | None]]:
        """Source -> {True: place of its first think document, False: of its first no-think one}, None without one.

        First by the order of the rows.
        """
        wanted, firsts = np.zeros(len(self._kept), bool), {}
        for name in self.sources:
            of_source = self._kept & self._is("source", lambda text, name=name: text == name)
            for think in (True, False):
                hits = of_source & (self._rows["think"] == think)
                firsts[name, think] = int(hits.argmax()) if hits.any() else None
                wanted[hits.argmax()] |= hits.any()
        places: dict[int, Location] = {}
        for place in self.locate(wanted):
            places.setdefault(place.row, place)
            if len(places) == wanted.sum():
                break
        return {name: {think: places.get(firsts[name, think]) for think in (True, False)} for name in self.sources}

    # ------------------------------------------------------------ text

    def texts(self, ids: Iterable[int]) -> list[str]:
        """[T] the text of each token; joined, they are the text to which the tokenizer decodes the ids.

        A character of several tokens is at the last of them; the others are "".
        """
        ids = [int(i) for i in ids]
        known = self._token_texts
        for i in set(ids) - known.keys():
            known[i] = self._decode([i])
        texts = [known[i] for i in ids]
        for of_parts, run in groupby(range(len(ids)), key=lambda t: UNFINISHED in known[ids[t]]):
            if of_parts:
                run = list(run)
                texts[run[0] : run[-1] + 1] = self._streamed(ids[run[0] : run[-1] + 1])
        return texts if "".join(texts) == self._decode(ids) else self._streamed(ids)

    @cached_property
    def _token_texts(self) -> dict[int, str]:
        return {}

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _streamed(self, ids: list[int]) -> list[str]:
        """Token by token as a chat shows them: a token's text is what it adds to the few before it."""
        texts, context, shown = [], 0, 0  # ids[context:shown] were shown and decide how the next ones look
        for stop in range(1, len(ids) + 1):
            before, after = self._decode(ids[context:shown]), self._decode(ids[context:stop])
            unfinished = len(after) <= len(before) or after.endswith(UNFINISHED)
            if unfinished and stop < len(ids) and stop - shown < MOST_PARTS:
                texts.append("")
                continue
            texts.append(after[len(before) :])
            context, shown = shown, stop
        return texts
