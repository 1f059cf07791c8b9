"""Tokenized prompts and completions, fitted to max_seq_len, one completion per row, with its label if it has one."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from smolpost.chat.fates import Fate
from smolpost.data.dataset_folder import CHUNK_TOKENS, write_dataset
from smolpost.data.ledger import EQUAL, EQUAL_CUT, OVERLONG, UNTRAINED, Ends, Taken, ledger, write_rows
from smolpost.data.report import write_report
from smolpost.data.settings import Rows
from smolpost.errors import UserError
from smolpost.schema import Mixture

PARTS = ("prompt", "completion")
TYPES = {
    **{f"{part}_ids": "int32" for part in PARTS},
    "completion_mask": "int8",
    **{f"{part}_fates": "int8" for part in PARTS},
    "rows": "int32",
}
LABEL_TYPES = {"label": "int8"}
WEIGHT_TYPES = {"weights": "float32"}


def prepare_completions(stage: Rows, mixture: Mixture, taken: Taken, folder: Path) -> dict:
    """Write prompts and completions into a `datasets` folder.

    Columns: prompt_ids, as inference sees them; completion_ids; completion_mask: 1 for trained tokens, 0 for others,
    such as user and tool turns inside a completion; prompt_fates, completion_fates, the reasons (`chat.fates`); rows,
    the line in rows.parquet; of the layout `labelled`, label, 1 for a desired completion and 0 for an undesired one;
    weights, if the mixture weighs its sources (the last three as lists of one). A preference pair gives its desired
    completion, then its undesired one; both are kept, or both dropped, so that a pair never changes the balance.
    max_seq_len limits prompt and completion together.

    Args, Returns and Raises: As `prepare.prepare`; stage.overlong may not be split, and labelled completions may not
        all have the same label.
    """
    if stage.overlong == "split":
        raise UserError(f"overlong=split with data={stage.data}: a completion cannot be split; use truncate or drop")
    fitted = _fit(stage, taken)
    ends = _ends_of(stage, taken, fitted)
    sources = ledger(stage, mixture, taken, ends)
    kept = _sides(fitted, np.flatnonzero(ends.reason == ""))
    totals, types, weights = {}, TYPES, taken.loss_weights(mixture)
    if stage.layout == "labelled":
        totals["labels"] = _count_labels(stage, taken, kept, sources)
        types = types | LABEL_TYPES
    if weights is not None:
        types = types | WEIGHT_TYPES
    write_dataset(folder, types, _chunks(taken, fitted, kept, weights, list(types)))
    write_rows(folder, taken, ends)
    return write_report(
        folder,
        {"layout": stage.layout, "max_seq_len": stage.max_seq_len, "overlong": stage.overlong},
        sources,
        evaluation_files_searched=taken.searched,
        completions=len(kept),
        tokens_per_completion=int(ends.fate_counts.sum()) / len(kept),
        **totals,
    )


def _fit(stage: Rows, taken: Taken) -> np.ndarray:
    """[M, S, 2] tokens of prompt and completion that fit, S sides a row; of rows dropped for their length, all."""
    parts = _parts(taken)
    lengths = parts.sum(2).max(1)
    overlong = lengths > stage.max_seq_len
    if stage.overlong == "refuse" and overlong.any():
        first = int(overlong.argmax())
        raise UserError(
            f"{taken.where(first)}: has {lengths[first]} tokens, above max_seq_len={stage.max_seq_len}; "
            f"{overlong.sum()} of {len(taken)} rows are too long, the longest has {lengths.max()}; "
            "raise max_seq_len or set overlong to truncate or drop"
        )
    if stage.overlong != "truncate":
        return parts
    room = np.maximum(stage.max_seq_len - parts[:, :, 0], 0)
    return np.stack((parts[:, :, 0], np.minimum(parts[:, :, 1], room)), axis=2)


def _parts(taken: Taken) -> np.ndarray:
    """[M, S, 2] tokens of prompt and completion; a side that a row does not have is empty."""
    parts = taken.tokens.parts[taken.rows]
    return parts.reshape(len(parts), -1, 2)


def _sides(fitted: np.ndarray, takes: np.ndarray) -> np.ndarray:
    """[K, 2] take and side of each completion of these takes, in order."""
    nth, side = np.nonzero(fitted[takes, :, 0])
    return np.stack((takes[nth], side), axis=1)


def _cut_parts(taken: Taken, sides: np.ndarray, fitted: np.ndarray) -> tuple[list, list]:
    """Ids and fates of the fitted parts: two views for each completion, its prompt's and its own.

    Args:
        sides: [K, 2] take and side.
    """
    take, side = sides.T
    parts = _parts(taken).reshape(len(taken), -1)
    starts = np.cumsum(parts, axis=1) - parts
    places = taken.tokens.offsets[taken.rows[take]][:, None] + starts.reshape(fitted.shape)[take, side]
    return taken.tokens.pieces(places.ravel(), (places + fitted[take, side]).ravel())


def _batches(sides: np.ndarray, fitted: np.ndarray) -> list[np.ndarray]:
    """The completions, about CHUNK_TOKENS tokens at a time."""
    chunk_of_side = np.cumsum(fitted[sides[:, 0], sides[:, 1]].sum(1)) // CHUNK_TOKENS
    return np.split(sides, np.flatnonzero(np.diff(chunk_of_side)) + 1)


def _ends_of(stage: Rows, taken: Taken, fitted: np.ndarray) -> Ends:
    tokens, num = taken.tokens, len(taken)
    overlong = _parts(taken).sum(2).max(1) > stage.max_seq_len
    counts = tokens.fate_counts[taken.rows].copy()
    counts[overlong] = 0
    reason = np.full(num, "", object)
    if stage.overlong == "drop":
        reason[overlong] = OVERLONG
    before: tuple[int, list[int]] = (-1, [])  # take and completion of the side before
    for sides in _batches(_sides(fitted, np.flatnonzero(reason == "")), fitted):
        ids, fates = _cut_parts(taken, sides, fitted)
        for i, (take, _) in enumerate(sides.tolist()):
            completion = ids[2 * i + 1].tolist()
            if not (fates[2 * i + 1] == Fate.TRAINED).any():
                reason[take] = UNTRAINED
            elif before == (take, completion):
                reason[take] = EQUAL_CUT if overlong[take] else EQUAL
            elif overlong[take]:
                counts[take] += np.bincount(np.concatenate(fates[2 * i : 2 * i + 2]), minlength=len(Fate))
            before = (take, completion)
    is_kept = reason == ""
    counts[~is_kept] = 0
    return Ends(
        fate_counts=counts,
        reason=reason,
        cut=overlong & is_kept,
        split=np.zeros(num, bool),
        shared=np.zeros(num, np.int64),
    )


def _count_labels(stage: Rows, taken: Taken, kept: np.ndarray, sources: dict[str, dict]) -> dict[str, int]:
    """Kept completions by label; the ledger's sources get theirs.

    Raises:
        UserError: All have the same label.
    """
    source = taken.source[taken.rows[kept[:, 0]]]
    for number, name in enumerate(taken.names):
        sources[name]["labels"] = _by_label(kept[source == number, 1])
    counts = _by_label(kept[:, 1])
    if 0 in counts.values():
        raise UserError(
            f"data={stage.data}: {counts['desired']:,} of its completions are desired and {counts['undesired']:,} "
            "undesired; training on labels needs both; add a source with the other label"
        )
    return counts


def _by_label(side: np.ndarray) -> dict[str, int]:
    return {"desired": int((side == 0).sum()), "undesired": int((side == 1).sum())}


def _chunks(
    taken: Taken, fitted: np.ndarray, kept: np.ndarray, weights: np.ndarray | None, columns: list[str]
) -> Iterator[dict]:
    """Columns of the kept completions, about CHUNK_TOKENS tokens at a time.

    Args:
        kept: [K, 2] take and side.
        weights: [M] of each take, or None.
    """
    for sides in _batches(kept, fitted):
        ids, fates = _cut_parts(taken, sides, fitted)
        take, side = sides.T
        ones = np.ones(len(sides), np.int64)
        chunk = {"rows": (taken.rows[take], ones), "label": (side == 0, ones)}
        for i, part in enumerate(PARTS):
            lengths = fitted[take, side, i]
            part_fates = np.concatenate(fates[i::2])
            chunk[f"{part}_ids"] = (np.concatenate(ids[i::2]), lengths)
            chunk[f"{part}_mask"] = (part_fates == Fate.TRAINED, lengths)
            chunk[f"{part}_fates"] = (part_fates, lengths)
        if weights is not None:
            chunk["weights"] = (weights[take], ones)
        yield {name: chunk[name] for name in columns}
