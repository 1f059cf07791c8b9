"""Tokenized rows to packs: fitted to max_seq_len, packed, written with the fate of every token."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from smolpost.chat.fates import Fate
from smolpost.data.dataset_folder import CHUNK_TOKENS, write_dataset
from smolpost.data.ledger import OVERLONG, UNTRAINED, Ends, Taken, ledger, write_rows
from smolpost.data.packing import PackPlan, best_fit_decreasing, unpacked, wrapped
from smolpost.data.report import write_report
from smolpost.data.settings import DocumentRows
from smolpost.data.tokens import Tokens
from smolpost.errors import UserError
from smolpost.schema import Mixture

PACK_TYPES = {"input_ids": "int32", "fates": "int8", "seq_lengths": "int32", "rows": "int32"}
WEIGHT_TYPES = {"seq_weights": "float32"}


@dataclass
class Documents:
    """What gets packed: take [D] into Taken.rows, row [D] into Tokens, start and stop [D] of its tokens."""

    take: np.ndarray
    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Documents":
        return Documents(self.take[chosen], self.row[chosen], self.start[chosen], self.stop[chosen])

    def lengths(self) -> np.ndarray:
        return self.stop - self.start


def prepare_documents(stage: DocumentRows, mixture: Mixture, taken: Taken, folder: Path) -> dict:
    """Pack conversations and texts into a `datasets` folder.

    Columns: input_ids; fates (`chat.fates`), which say which tokens train; seq_lengths, the tokens of each document in
    the pack; rows, the line in rows.parquet of each document; seq_weights, the weight of each document's loss, if the
    mixture weighs its sources. The first token of every document never trains, because nothing predicts it. `wrapped`
    packing cuts rows at the end of a pack, so stage.overlong is only for `bfd` and `none`.

    Args, Returns and Raises: As `prepare.prepare`.
    """
    tokens = taken.tokens
    documents = whole_rows(tokens, taken.rows)
    if stage.packing != "wrapped":
        documents = fit(stage, taken, documents)
    documents, pieces, plan = pack(stage, tokens, documents)
    ends = ends_of(stage, taken, documents, pieces)
    sources = ledger(stage, mixture, taken, ends)
    weights = taken.loss_weights(mixture)
    types = PACK_TYPES if weights is None else PACK_TYPES | WEIGHT_TYPES
    write_dataset(folder, types, pack_chunks(tokens, pieces, plan, weights))
    write_rows(folder, taken, ends)
    num_tokens = int(plan.pack_lengths().sum())
    return write_report(
        folder,
        {
            "layout": stage.layout,
            "packing": stage.packing,
            "max_seq_len": stage.max_seq_len,
            "overlong": stage.overlong,
        },
        sources,
        evaluation_files_searched=taken.searched,
        packs=plan.num_packs,
        tokens_per_pack=num_tokens / plan.num_packs,
        fill_percent=100 * num_tokens / (plan.num_packs * stage.max_seq_len),
    )


def whole_rows(tokens: Tokens, rows: np.ndarray) -> Documents:
    return Documents(np.arange(len(rows)), rows, tokens.offsets[rows], tokens.offsets[rows + 1])


def fit(stage: DocumentRows, taken: Taken, documents: Documents) -> Documents:
    """The rows as documents of at most max_seq_len tokens, by the stage's policy."""
    limit = stage.max_seq_len
    lengths = documents.lengths()
    overlong = lengths > limit
    if not overlong.any():
        return documents
    if stage.overlong == "refuse":
        first = int(overlong.argmax())
        others = f"; {overlong.sum()} of {len(taken)} rows are too long, the longest has {lengths.max()}"
        raise UserError(
            f"{taken.where(first)}: has {lengths[first]} tokens, above max_seq_len={limit}{others}; "
            "raise max_seq_len or set overlong to truncate, split or drop"
        )
    if stage.overlong == "drop":
        return documents[~overlong]
    if stage.overlong == "truncate":
        return Documents(documents.take, documents.row, documents.start, documents.start + np.minimum(lengths, limit))
    num_pieces = -(-lengths // limit)
    pieces = documents[np.repeat(np.arange(len(lengths)), num_pieces)]
    nth = np.arange(len(pieces.row)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    start = pieces.start + nth * limit
    return Documents(pieces.take, pieces.row, start, np.minimum(pieces.stop, start + limit))


def pack(stage: DocumentRows, tokens: Tokens, documents: Documents) -> tuple[Documents, Documents, PackPlan]:
    """Leave out documents that train nothing, and plan the packs.

    Returns:
        The documents kept, the pieces of the plan in its order, and the plan.
    """
    documents = documents[fate_counts(tokens, documents)[:, Fate.TRAINED] > 0]
    lengths = documents.lengths()
    if stage.packing == "bfd":
        plan = best_fit_decreasing(lengths, stage.max_seq_len)
    else:
        plan = wrapped(lengths, stage.max_seq_len) if stage.packing == "wrapped" else unpacked(lengths)
    origin = documents[plan.document]
    pieces = Documents(origin.take, origin.row, origin.start + plan.start, origin.start + plan.stop)
    return documents, pieces, plan


def fate_counts(tokens: Tokens, documents: Documents) -> np.ndarray:
    """[D, len(Fate)] tokens of each document by fate, the first one FIRST."""
    counts = tokens.fate_counts[documents.row].copy()
    is_cut = np.flatnonzero(documents.lengths() != tokens.lengths()[documents.row])
    _, fates = tokens.pieces(documents.start[is_cut], documents.stop[is_cut])
    for i, piece in zip(is_cut.tolist(), fates, strict=True):
        counts[i] = np.bincount(piece, minlength=len(Fate))
    np.subtract.at(counts, (np.arange(len(counts)), tokens.fates_at(documents.start)), 1)
    counts[:, Fate.FIRST] += 1
    return counts


def pack_chunks(tokens: Tokens, pieces: Documents, plan: PackPlan, weights: np.ndarray | None) -> Iterator[dict]:
    """Columns of the packs, about CHUNK_TOKENS tokens at a time.

    Args:
        weights: [M] of each take, or None.
    """
    piece_lengths, pack_lengths = pieces.lengths(), plan.pack_lengths()
    chunk_of_pack = np.cumsum(pack_lengths) // CHUNK_TOKENS
    edges = np.flatnonzero(np.diff(chunk_of_pack, prepend=-1, append=np.iinfo(np.int64).max))
    for first, last in pairwise(edges):
        chosen = slice(plan.pack_offsets[first], plan.pack_offsets[last])
        # A piece is a slice: copying slices costs a fraction of an index array with an entry per token.
        parts = tokens.pieces(pieces.start[chosen], pieces.stop[chosen])
        ids, fates = map(np.concatenate, parts)
        lengths = piece_lengths[chosen]
        fates[np.cumsum(lengths) - lengths] = Fate.FIRST
        num_documents = np.diff(plan.pack_offsets[first : last + 1])
        chunk = {
            "input_ids": (ids, pack_lengths[first:last]),
            "fates": (fates, pack_lengths[first:last]),
            "seq_lengths": (lengths, num_documents),
            "rows": (pieces.row[chosen], num_documents),
        }
        if weights is not None:
            chunk["seq_weights"] = (weights[pieces.take[chosen]], num_documents)
        yield chunk


def ends_of(stage: DocumentRows, taken: Taken, documents: Documents, pieces: Documents) -> Ends:
    num, tokens = len(taken), taken.tokens
    by_take = np.zeros((num, len(Fate)), np.int64)
    np.add.at(by_take, pieces.take, fate_counts(tokens, pieces))
    is_overlong = (tokens.lengths()[taken.rows] > stage.max_seq_len) & (stage.packing != "wrapped")
    is_kept = np.bincount(documents.take, minlength=num) > 0
    reason = np.where(is_overlong & (stage.overlong == "drop"), OVERLONG, UNTRAINED)
    return Ends(
        fate_counts=by_take,
        reason=np.where(is_kept, "", reason),
        cut=is_overlong & is_kept & (stage.overlong == "truncate"),
        split=(np.bincount(pieces.take, minlength=num) > 1) | (is_overlong & is_kept & (stage.overlong == "split")),
        shared=np.zeros(num, np.int64),
    )
