"""The tokenized and chosen rows of a mixture, and the ledger of what happened to each of them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smolpost.chat.fates import MASKED, Fate
from smolpost.data.report import new_source, percentiles
from smolpost.data.settings import Rows
from smolpost.data.tokens import Tokens
from smolpost.errors import UserError
from smolpost.schema import Mixture

ROWS = "rows.parquet"  # a line for each tokenized row: where it comes from and what happened to it
DROPPED = "dropped.jsonl"  # the dropped rows, to read
UNTRAINED = "without a trained token"
OVERLONG = "overlong"
EQUAL = "equal once rendered"  # both sides of a pair
EQUAL_CUT = "equal after truncation"
REFUSED = "refused"
THINK_TOLERANCE = 0.01  # of a declared share of think rows


class RefusedRows(UserError):
    """More rows of a source are refused than the stage allows to drop.

    Attributes:
        faults: Why, a line with its place for each of them.
    """

    def __init__(self, text: str, faults: list[str]):
        super().__init__(text)
        self.faults = faults


@dataclass
class Taken:
    """N tokenized rows, of which M are taken, some of them more than once.

    Attributes:
        names: Sources, as declared.
        source: [N] index into names.
        rows: [M] rows of tokens in the mixture's order.
        removed: Row of tokens -> (reason, detail), for rows removed before anything was taken.
        removed_rows: [R] those rows, as often as they would have been taken.
        available: Source -> its rows, taken or not.
        searched: Evaluation file -> what the rows were compared with (`hygiene.HygieneFilter.searched`).
    """

    names: list[str]
    tokens: Tokens
    source: np.ndarray
    rows: np.ndarray
    removed: dict[int, tuple[str, str]]
    removed_rows: np.ndarray
    available: dict[str, int]
    searched: dict[str, dict[str, int]]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, take: int) -> str:
        """File, row and source of the take, for messages."""
        row = self.rows[take]
        return f"{self.tokens.where(row)} (source {self.names[self.source[row]]})"

    def loss_weights(self, mixture: Mixture) -> np.ndarray | None:
        """[M] float32 weight of each take's loss; None if all are 1."""
        weights = np.array([mixture.sources[name].loss_weight for name in self.names], np.float32)
        return None if (weights == 1).all() else weights[self.source[self.rows]]


@dataclass
class Ends:
    """What happened to M taken rows.

    Attributes:
        fate_counts: [M, len(Fate)] tokens in the prepared rows by fate; all 0 for a dropped row.
        reason: [M] why a row is dropped, "" if it is kept.
        cut: [M] bool: truncated.
        split: [M] bool: in several pieces.
        shared: [M] tokens that serve both sides of a pair.
    """

    fate_counts: np.ndarray
    reason: np.ndarray
    cut: np.ndarray
    split: np.ndarray
    shared: np.ndarray


def ledger(stage: Rows, mixture: Mixture, taken: Taken, ends: Ends) -> dict[str, dict]:
    """The report's entry of each source.

    Raises:
        UserError: A source has no trained token, more dropped rows than the stage allows, or another share of think
            rows than declared.
    """
    tokens, source = taken.tokens, taken.source[taken.rows]
    read, kept = tokens.lengths()[taken.rows], ends.fate_counts.sum(1)
    think = tokens.think[taken.rows] & (ends.reason == "")
    is_duplicate = _duplicates(taken)
    sources = {}
    for i, name in enumerate(taken.names):
        here, was_removed = source == i, taken.removed_rows[taken.source[taken.removed_rows] == i]
        rows, fates = taken.rows[here], ends.fate_counts[here].sum(0)
        is_kept, is_cut, lost = (ends.reason == "")[here], ends.cut[here], (read - kept)[here]
        dropped = _count_values(ends.reason[here][~is_kept]) | _count_values(
            [taken.removed[row][0] for row in was_removed.tolist()]
        )
        sources[name] = new_source() | {
            "rows_available": taken.available[name],
            "rows_read": int(here.sum()) + len(was_removed),
            "rows_kept": int(is_kept.sum()),
            "rows_repeated": len(rows) - len(np.unique(rows)),
            "rows_duplicate": int(is_duplicate[np.unique(rows)].sum()),
            "rows_truncated": int(is_cut.sum()),
            "rows_split": int(ends.split[here].sum()),
            "think_rows": int(think[here].sum()),
            "no_think_rows": int((is_kept & ~think[here] & ~tokens.is_text[rows]).sum()),
            "tokens_read": int(read[here].sum() + tokens.lengths()[was_removed].sum()),
            "tokens_unknown": int(tokens.unknown[rows].sum()),
            "tokens_neutralised": int(tokens.neutralised[rows].sum()),
            "tokens_trained": int(fates[Fate.TRAINED]),
            "tokens_masked": int(fates.sum() - fates[Fate.TRAINED]),
            "masked": {label: int(fates[fate]) for fate, label in MASKED.items()},
            "tokens_truncated": int(lost[is_cut].sum()),
            "tokens_dropped": int(lost[~is_cut].sum() + tokens.lengths()[was_removed].sum()),
            "tokens_shared": int(ends.shared[here].sum()),
            "dropped": dropped,
            "unread": _count_names(tokens.unread, rows),
            "notes": _count_names(tokens.notes, rows[is_kept]),
            "loss_weight": mixture.sources[name].loss_weight,
            "length_percentiles": percentiles(read[here]),
        }
        faults = [taken.removed[row][1] for row in was_removed.tolist() if taken.removed[row][0] == REFUSED]
        check_refused(stage, name, sources[name]["rows_read"], faults)
        _check_source(stage, mixture, name, sources[name])
    return sources


def _count_names(lists: pa.ChunkedArray, rows: np.ndarray) -> dict[str, int]:
    """Name -> rows that have it in their list, of those taken."""
    counts = lists.take(pa.array(rows)).combine_chunks().flatten().value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda entry: entry["values"])}


def check_refused(stage: Rows, name: str, num_rows: int, faults: list[str]) -> None:
    """
    Raises:
        RefusedRows: Too many, with the first one's reason; or all.
    """
    if len(faults) > min(stage.max_dropped * num_rows, num_rows - 1):
        some = f"; or raise max_dropped={stage.max_dropped}" if len(faults) < num_rows else ""
        counted = f" (source {name}: {len(faults)} of {num_rows} rows are refused)" if num_rows > 1 else ""
        raise RefusedRows(f"{faults[0]}{some}{counted}", faults)


def _duplicates(taken: Taken) -> np.ndarray:
    """[N] bool: an earlier row has the same tokens; removed rows do not count."""
    found = np.ones(len(taken.tokens), bool)
    kept = np.setdiff1d(np.arange(len(found)), list(taken.removed))
    found[kept[np.unique(taken.tokens.content[kept], return_index=True)[1]]] = False
    return found


def _count_values(values) -> dict[str, int]:
    names, counts = np.unique(np.array(values, dtype=str), return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def _check_source(stage: Rows, mixture: Mixture, name: str, entry: dict) -> None:
    """Refuse a source with too little left, or with another share of think rows than declared.

    Raises:
        UserError: Names the source and the numbers.
    """
    reasons = ", ".join(f"{count} {reason}" for reason, count in entry["dropped"].items())
    if not entry["tokens_trained"]:
        raise UserError(
            f"source {name}: none of its {entry['rows_read']} rows has a trained token ({reasons}); "
            "check its roles and train flags, raise max_seq_len, or remove it from the mixture"
        )
    dropped = sum(entry["dropped"].values()) / entry["rows_read"]
    if dropped > stage.max_dropped:
        raise UserError(
            f"source {name}: {dropped:.1%} of its {entry['rows_read']} rows are dropped ({reasons}), above "
            f"max_dropped={stage.max_dropped}; look at {DROPPED}'s rows, raise max_seq_len, or raise max_dropped"
        )
    declared = mixture.sources[name].think_share
    share = entry["think_rows"] / max(1, entry["rows_kept"])
    if declared is not None and abs(share - declared) > THINK_TOLERANCE:
        raise UserError(
            f"source {name}: {share:.1%} of its {entry['rows_kept']} rows train a think block, and "
            f"sources.{name}.think_share={declared}; check chat_template_kwargs.enable_thinking of its rows, or change "
            "think_share"
        )


def refused_rows(folder: Path) -> list[str]:
    """The reason of each refused row of a prepared folder."""
    dropped = [json.loads(line) for line in (folder / DROPPED).read_text().splitlines()]
    return [entry["detail"] for entry in dropped if entry["reason"] == REFUSED]


def write_rows(folder: Path, taken: Taken, ends: Ends) -> None:
    """`rows.parquet`, a line per tokenized row, and `dropped.jsonl`, a line per dropped one."""
    tokens = taken.tokens
    reason = np.full(len(tokens), "", object)
    reason[taken.rows] = ends.reason
    detail = {row: f"{length} tokens" for row, length in enumerate(tokens.lengths()) if reason[row] == OVERLONG}
    for row, (why, what) in taken.removed.items():
        reason[row], detail[row] = why, what
    names = pa.DictionaryArray.from_arrays(pa.array(taken.source), taken.names)
    columns = {
        "source": names,
        "path": pa.array(tokens.path.tolist()).dictionary_encode(),
        "number": tokens.number,
        "tokens": tokens.lengths(),
        "think": tokens.think,
        "dropped": pa.array(reason.tolist(), pa.string()),
    }
    pq.write_table(pa.table(columns), folder / ROWS)
    with open(folder / DROPPED, "w") as file:
        for row in np.flatnonzero(reason != "").tolist():
            where = {"source": taken.names[taken.source[row]], "path": tokens.path[row], "row": int(tokens.number[row])}
            file.write(json.dumps(where | {"reason": reason[row], "detail": detail.get(row, "")}) + "\n")
