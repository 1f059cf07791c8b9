"""Tokenized preference pairs, fitted to max_seq_len, one pair per row."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from smolpost.chat.fates import Fate
from smolpost.data.collate import PARTS
from smolpost.data.dataset_folder import CHUNK_TOKENS, write_dataset
from smolpost.data.ledger import EQUAL, EQUAL_CUT, OVERLONG, UNTRAINED, Ends, Taken, ledger, write_rows
from smolpost.data.report import write_report
from smolpost.data.settings import PairRows
from smolpost.errors import UserError
from smolpost.schema import Mixture

PAIR_TYPES = {
    **{f"{part}_ids": "int32" for part in PARTS},
    **{f"{part}_mask": "int8" for part in PARTS},
    **{f"{part}_fates": "int8" for part in PARTS},
    "rows": "int32",
}
WEIGHT_TYPES = {"weights": "float32"}


def prepare_pairs(stage: PairRows, mixture: Mixture, taken: Taken, folder: Path) -> dict:
    """Write preference pairs into a `datasets` folder.

    Columns: prompt_ids, chosen_ids, rejected_ids; prompt_mask, chosen_mask, rejected_mask: 1 for scored tokens, 0 for
    others, such as user and tool turns inside a completion; prompt_fates, chosen_fates, rejected_fates, the reasons
    (`chat.fates`); rows, the line in rows.parquet; weights, the weight of the pair's loss, if the mixture weighs its
    sources (the last two as lists of one). Tokens with which both completions begin are part of the prompt; with mask
    1 they are scored for both sides. max_seq_len limits the prompt together with the longer completion.

    Args, Returns and Raises: As `prepare.prepare`; stage.overlong may not be split.
    """
    if stage.overlong == "split":
        raise UserError(f"overlong=split in the apo stage on data={stage.data}: pairs cannot be split; use drop")
    fitted = _fit(stage, taken)
    ends = _ends_of(stage, taken, fitted)
    sources = ledger(stage, mixture, taken, ends)
    weights = taken.loss_weights(mixture)
    types = PAIR_TYPES if weights is None else PAIR_TYPES | WEIGHT_TYPES
    kept = np.flatnonzero(ends.reason == "")
    write_dataset(folder, types, _pair_chunks(taken, fitted, kept, weights))
    write_rows(folder, taken, ends)
    num_tokens = int(ends.fate_counts.sum())
    return write_report(
        folder,
        {"layout": stage.layout, "max_seq_len": stage.max_seq_len, "overlong": stage.overlong},
        sources,
        evaluation_files_searched=taken.searched,
        pairs=len(kept),
        tokens_per_pair=num_tokens / len(kept),
    )


def _fit(stage: PairRows, taken: Taken) -> np.ndarray:
    """[M, 3] tokens of prompt, chosen and rejected that fit; of pairs dropped for their length, all tokens."""
    parts = taken.tokens.parts[taken.rows]
    lengths = parts[:, 0] + parts[:, 1:].max(1)
    overlong = lengths > stage.max_seq_len
    if stage.overlong == "refuse" and overlong.any():
        first = int(overlong.argmax())
        raise UserError(
            f"{taken.where(first)}: has {lengths[first]} tokens, above max_seq_len={stage.max_seq_len}; "
            f"{overlong.sum()} of {len(taken)} pairs are too long, the longest has {lengths.max()}; "
            "raise max_seq_len or set overlong to truncate or drop"
        )
    if stage.overlong != "truncate":
        return parts
    room = np.maximum(stage.max_seq_len - parts[:, :1], 0)
    return np.concatenate((parts[:, :1], np.minimum(parts[:, 1:], room)), axis=1)


def batches(takes: np.ndarray, fitted: np.ndarray) -> list[np.ndarray]:
    """The takes, about CHUNK_TOKENS tokens at a time."""
    chunk_of_take = np.cumsum(fitted[takes].sum(1)) // CHUNK_TOKENS
    return np.split(takes, np.flatnonzero(np.diff(chunk_of_take)) + 1)


def _cut_parts(taken: Taken, takes: np.ndarray, fitted: np.ndarray) -> tuple[list, list]:
    """Ids and fates of the fitted parts: three views for each take, pair after pair."""
    tokens, rows = taken.tokens, taken.rows[takes]
    parts = tokens.parts[rows]
    starts = tokens.offsets[rows][:, None] + np.cumsum(parts, axis=1) - parts
    return tokens.pieces(starts.ravel(), (starts + fitted[takes]).ravel())


def _ends_of(stage: PairRows, taken: Taken, fitted: np.ndarray) -> Ends:
    tokens, num = taken.tokens, len(taken)
    parts = tokens.parts[taken.rows]
    overlong = parts[:, 0] + parts[:, 1:].max(1) > stage.max_seq_len
    counts = tokens.fate_counts[taken.rows].copy()
    reason = np.full(num, "", object)
    if stage.overlong == "drop":
        reason[overlong] = OVERLONG
    for takes in batches(np.flatnonzero(reason == ""), fitted):
        ids, fates = _cut_parts(taken, takes, fitted)
        for i, take in enumerate(takes.tolist()):
            pair_ids, pair_fates = ids[3 * i : 3 * i + 3], fates[3 * i : 3 * i + 3]
            scored = [(part == Fate.TRAINED).any() for part in pair_fates]
            if not (scored[0] or (scored[1] and scored[2])):
                reason[take] = UNTRAINED
            elif np.array_equal(pair_ids[1], pair_ids[2]):
                reason[take] = EQUAL_CUT if overlong[take] else EQUAL
            elif overlong[take]:
                counts[take] = np.bincount(np.concatenate(pair_fates), minlength=len(Fate))
    is_kept = reason == ""
    counts[~is_kept] = 0
    return Ends(
        fate_counts=counts,
        reason=reason,
        cut=overlong & is_kept,
        split=np.zeros(num, bool),
        shared=np.where(is_kept, parts[:, 0], 0),
    )


def _pair_chunks(taken: Taken, fitted: np.ndarray, kept: np.ndarray, weights: np.ndarray | None) -> Iterator[dict]:
    """Columns of the kept pairs, about CHUNK_TOKENS tokens at a time."""
    for takes in batches(kept, fitted):
        ids, fates = _cut_parts(taken, takes, fitted)
        chunk = {}
        for i, part in enumerate(PARTS):
            lengths = fitted[takes, i]
            part_fates = np.concatenate(fates[i::3])
            chunk[f"{part}_ids"] = (np.concatenate(ids[i::3]), lengths)
            chunk[f"{part}_mask"] = ((part_fates == Fate.TRAINED), lengths)
            chunk[f"{part}_fates"] = (part_fates, lengths)
        ones = np.ones(len(takes), np.int64)
        chunk["rows"] = (taken.rows[takes], ones)
        if weights is not None:
            chunk["weights"] = (weights[takes], ones)
        yield chunk
