"""Rows to tokenized, masked and packed datasets: all that happens to a row between its file and the trainer.

N rows, D documents (rows, or pieces of them under the split policy), T tokens of all rows one after another.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from smolpost.data.collate import IGNORE_INDEX, PARTS
from smolpost.data.dataset_folder import CHUNK_TOKENS, concatenated, write_dataset
from smolpost.data.packing import PackPlan, best_fit_decreasing, unpacked, wrapped
from smolpost.data.report import format_report, new_source, percentiles, write_report
from smolpost.data.tokenize import PAIR_TYPES, Rows, Tokens, tokenize_pair, tokenize_rows, where_of
from smolpost.errors import UserError
from smolpost.schema import APOStage, SFTStage, TrainStage

__all__ = ["format_report", "prepare_apo", "prepare_sft"]

THINK = "<think>"
UNTRAINED = "without a trained token"
OVERLONG = "overlong"
PACK_TYPES = {"input_ids": "int32", "labels": "int32", "seq_lengths": "int32"}
ID_COLUMNS = tuple(f"{part}_ids" for part in PARTS)
MASK_COLUMNS = tuple(f"{part}_mask" for part in PARTS)


# ---------------------------------------------------------------- sft


@dataclass
class Documents:
    """What gets packed: row [D], and start and stop [D] into Tokens.ids."""

    row: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Documents":
        return Documents(self.row[chosen], self.start[chosen], self.stop[chosen])

    def lengths(self) -> np.ndarray:
        return self.stop - self.start


def prepare_sft(stage: SFTStage, rows: Rows, tokenizer, folder: Path) -> dict:
    """Tokenize, mask and pack conversations and texts into a `datasets` folder.

    Columns: input_ids, labels (not shifted; -100 where not trained and on the first token of every document, which
    nothing predicts), seq_lengths (tokens of each document in the pack). `wrapped` packs cut rows wherever a pack
    ends, so stage.overlong is for `bfd` and `none`.

    Args:
        rows: As `mixtures.mix` returns them.
        tokenizer: Its chat template is the stage's.
        folder: Exists and is empty.
    Returns:
        The report, also written as data_report.json.
    Raises:
        UserError: A row is refused or overlong, or a source has no trained token; the folder may hold a part.
    """
    check_not_empty(stage, rows)
    tokens = tokenize_rows(stage, rows, tokenizer)
    documents = whole_rows(tokens) if stage.packing == "wrapped" else fit(stage, rows, tokens)
    documents, pieces, plan = pack(stage, tokens, documents)
    sources = sft_sources(stage, rows, tokens, documents, pieces, tokenizer)
    check_trained(sources)
    write_dataset(folder, PACK_TYPES, pack_chunks(tokens, pieces, plan))
    num_tokens = int(plan.pack_lengths().sum())
    return write_report(
        folder,
        {"kind": stage.kind, "packing": stage.packing, "max_seq_len": stage.max_seq_len, "overlong": stage.overlong},
        sources,
        packs=plan.num_packs,
        tokens_per_pack=num_tokens / plan.num_packs,
        fill_percent=100 * num_tokens / (plan.num_packs * stage.max_seq_len),
    )


def whole_rows(tokens: Tokens) -> Documents:
    return Documents(np.arange(len(tokens.is_text)), tokens.offsets[:-1], tokens.offsets[1:])


def fit(stage: SFTStage, rows: Rows, tokens: Tokens) -> Documents:
    """The rows as documents of at most max_seq_len tokens, by the stage's policy."""
    documents, limit = whole_rows(tokens), stage.max_seq_len
    overlong = documents.lengths() > limit
    if not overlong.any():
        return documents
    if stage.overlong == "refuse":
        i = int(overlong.argmax())
        others = f"; {overlong.sum()} of {len(rows)} rows are too long, the longest has {documents.lengths().max()}"
        raise overlong_error(stage, i, *rows[i], documents.lengths()[i], others, "truncate, split or drop")
    if stage.overlong == "drop":
        return documents[~overlong]
    if stage.overlong == "truncate":
        return Documents(documents.row, documents.start, np.minimum(documents.stop, documents.start + limit))
    num_pieces = -(-documents.lengths() // limit)
    pieces = documents[np.repeat(documents.row, num_pieces)]
    nth = np.arange(len(pieces.row)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    start = pieces.start + nth * limit
    return Documents(pieces.row, start, np.minimum(pieces.stop, start + limit))


def pack(stage: SFTStage, tokens: Tokens, documents: Documents) -> tuple[Documents, Documents, PackPlan]:
    """Leave out documents that train nothing, plan the packs and unlabel the first token of every piece.

    Returns:
        The documents kept, the pieces of the plan in its order, and the plan.
    """
    tokens.trained[documents.start] = False
    documents = documents[count_true(tokens.trained, documents) > 0]
    lengths = documents.lengths()
    if stage.packing == "bfd":
        plan = best_fit_decreasing(lengths, stage.max_seq_len)
    else:
        plan = wrapped(lengths, stage.max_seq_len) if stage.packing == "wrapped" else unpacked(lengths)
    origin = documents.start[plan.document]
    pieces = Documents(documents.row[plan.document], origin + plan.start, origin + plan.stop)
    tokens.trained[pieces.start] = False
    return documents, pieces, plan


def pack_chunks(tokens: Tokens, pieces: Documents, plan: PackPlan) -> Iterator[dict]:
    """Columns of the packs, about CHUNK_TOKENS tokens at a time."""
    piece_lengths, pack_lengths = pieces.lengths(), plan.pack_lengths()
    chunk_of_pack = np.cumsum(pack_lengths) // CHUNK_TOKENS
    edges = np.flatnonzero(np.diff(chunk_of_pack, prepend=-1, append=np.iinfo(np.int64).max))
    for first, last in pairwise(edges):
        chosen = slice(plan.pack_offsets[first], plan.pack_offsets[last])
        # A piece is a slice: copying slices costs a fraction of an index array with an entry per token.
        spans = list(zip(pieces.start[chosen].tolist(), pieces.stop[chosen].tolist(), strict=True))
        ids = np.concatenate([tokens.ids[start:stop] for start, stop in spans])
        labels = ids.copy()
        labels[~np.concatenate([tokens.trained[start:stop] for start, stop in spans])] = IGNORE_INDEX
        yield {
            "input_ids": (ids, pack_lengths[first:last]),
            "labels": (labels, pack_lengths[first:last]),
            "seq_lengths": (piece_lengths[chosen], np.diff(plan.pack_offsets[first : last + 1])),
        }


def sft_sources(stage, rows, tokens: Tokens, documents: Documents, pieces: Documents, tokenizer) -> dict[str, dict]:
    """The report's entry of each source, in order of first appearance."""
    num_rows, read = len(rows), np.diff(tokens.offsets)
    kept = np.bincount(documents.row, documents.lengths(), num_rows).astype(np.int64)
    trained = np.bincount(documents.row, count_true(tokens.trained, documents), num_rows).astype(np.int64)
    think_tokens = tokens.trained & (tokens.ids == tokenizer.convert_tokens_to_ids(THINK))
    think = count_true(think_tokens, whole_rows(tokens)) > 0
    unknown = count_true(tokens.ids == tokenizer.unk_token_id, whole_rows(tokens))
    is_overlong = (read > stage.max_seq_len) & (stage.packing != "wrapped")
    is_kept = kept > 0
    is_truncated = is_overlong & is_kept & (stage.overlong == "truncate")
    is_wrapped_over = np.bincount(pieces.row, minlength=num_rows) > 1
    is_split = is_wrapped_over | (is_overlong & is_kept & (stage.overlong == "split"))
    reason = np.where(is_overlong & (stage.overlong == "drop"), OVERLONG, UNTRAINED)

    sources = {}
    names = np.array([name for name, _ in rows])
    for name in dict.fromkeys(names.tolist()):
        here = names == name
        lost = (read - kept)[here]
        cut = is_truncated[here]
        sources[name] = new_source() | {
            "rows_read": int(here.sum()),
            "rows_kept": int(is_kept[here].sum()),
            "rows_truncated": int(cut.sum()),
            "rows_split": int(is_split[here].sum()),
            "think_rows": int((think & is_kept)[here].sum()),
            "no_think_rows": int((~think & ~tokens.is_text & is_kept)[here].sum()),
            "tokens_read": int(read[here].sum()),
            "tokens_unknown": int(unknown[here].sum()),
            "tokens_trained": int(trained[here].sum()),
            "tokens_masked": int((kept - trained)[here].sum()),
            "tokens_truncated": int(lost[cut].sum()),
            "tokens_dropped": int(lost[~cut].sum()),
            "dropped": dict(Counter(reason[here & ~is_kept].tolist())),
            "length_percentiles": percentiles(read[here]),
        }
    return sources


# ---------------------------------------------------------------- apo


def prepare_apo(stage: APOStage, rows: Rows, tokenizer, folder: Path) -> dict:
    """Tokenize and mask preference pairs into a `datasets` folder, one pair per row.

    Columns: prompt_ids, chosen_ids, rejected_ids, and prompt_mask, chosen_mask, rejected_mask: 1 where the policy is
    scored, 0 on user and tool turns inside a completion. Tokens that both completions begin with are part of the
    prompt, scored for both sides where its mask is 1. max_seq_len bounds the prompt with the longer completion.

    Args, Returns and Raises: As prepare_sft; stage.overlong may not be split.
    """
    check_not_empty(stage, rows)
    if stage.overlong == "split":
        raise UserError(f"overlong=split in the apo stage on data={stage.data}: pairs cannot be split; use drop")
    sources, lengths = {}, {}
    write_dataset(folder, PAIR_TYPES, pair_chunks(fitted_pairs(stage, rows, tokenizer, sources, lengths)))
    for name, entry in sources.items():
        entry["length_percentiles"] = percentiles(lengths[name])
    check_trained(sources)
    pairs = sum(entry["rows_kept"] for entry in sources.values())
    num_tokens = sum(entry["tokens_trained"] + entry["tokens_masked"] for entry in sources.values())
    return write_report(
        folder,
        {"kind": stage.kind, "max_seq_len": stage.max_seq_len, "overlong": stage.overlong},
        sources,
        pairs=pairs,
        tokens_per_pair=num_tokens / pairs,
    )


def fitted_pairs(stage: APOStage, rows: Rows, tokenizer, sources: dict, lengths: dict) -> Iterator[dict]:
    """The columns of each pair that is kept; what happened to all of them goes into sources and lengths."""
    think_id = tokenizer.convert_tokens_to_ids(THINK)
    for i, (name, row) in enumerate(tqdm(rows, desc=f"prepare {stage.data}", unit="pair", disable=None)):
        pair = tokenize_pair(stage, i, name, row, tokenizer)
        entry = sources.setdefault(name, new_source())
        entry["rows_read"] += 1
        entry["tokens_read"] += num_ids(pair)
        entry["tokens_unknown"] += sum(int((pair[key] == tokenizer.unk_token_id).sum()) for key in ID_COLUMNS)
        length = longest_side(pair)
        lengths.setdefault(name, []).append(length)
        overlong = length > stage.max_seq_len
        if overlong and stage.overlong == "refuse":
            raise overlong_error(stage, i, name, row, length, "", "truncate or drop")
        room = stage.max_seq_len - len(pair["prompt_ids"])
        fitted = {key: ids if key.startswith("prompt") else ids[: max(room, 0)] for key, ids in pair.items()}
        reason = drop_reason(stage, fitted, overlong)
        if reason:
            entry["dropped"][reason] = entry["dropped"].get(reason, 0) + 1
            entry["tokens_dropped"] += num_ids(pair)
            continue
        scored = sum(int(fitted[key].sum()) for key in MASK_COLUMNS)
        has_think = any(
            bool((fitted[f"{part}_ids"][fitted[f"{part}_mask"] == 1] == think_id).any()) for part in PARTS[:2]
        )
        entry["rows_kept"] += 1
        entry["rows_truncated"] += int(overlong)
        entry["think_rows" if has_think else "no_think_rows"] += 1
        entry["tokens_trained"] += scored
        entry["tokens_shared"] += len(fitted["prompt_ids"])
        entry["tokens_masked"] += num_ids(fitted) - scored
        entry["tokens_truncated"] += num_ids(pair) - num_ids(fitted)
        yield fitted


def drop_reason(stage: APOStage, pair: dict[str, np.ndarray], overlong: bool) -> str | None:
    if overlong and stage.overlong == "drop":
        return OVERLONG
    if not (pair["prompt_mask"].any() or (pair["chosen_mask"].any() and pair["rejected_mask"].any())):
        return UNTRAINED
    if np.array_equal(pair["chosen_ids"], pair["rejected_ids"]):
        return "equal after truncation" if overlong else "equal once rendered"
    return None


def pair_chunks(pairs: Iterator[dict]) -> Iterator[dict]:
    """Pairs gathered to about CHUNK_TOKENS tokens at a time."""
    gathered, size = [], 0
    for pair in pairs:
        gathered.append(pair)
        size += num_ids(pair)
        if size >= CHUNK_TOKENS:
            yield pair_chunk(gathered)
            gathered, size = [], 0
    if gathered:
        yield pair_chunk(gathered)


def pair_chunk(pairs: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        key: (
            concatenated([pair[key] for pair in pairs], dtype),
            np.array([len(pair[key]) for pair in pairs], np.int64),
        )
        for key, dtype in PAIR_TYPES.items()
    }


def num_ids(pair: dict[str, np.ndarray]) -> int:
    return sum(len(pair[key]) for key in ID_COLUMNS)


def longest_side(pair: dict[str, np.ndarray]) -> int:
    """Tokens of the prompt with the longer completion."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


# ---------------------------------------------------------------- both


def count_true(flags: np.ndarray, spans: Documents) -> np.ndarray:
    """[D] how many flags are set in each span."""
    # np.add.reduceat would first widen all flags to the type it adds in: eight bytes per token.
    edges = zip(spans.start.tolist(), spans.stop.tolist(), strict=True)
    return np.array([np.count_nonzero(flags[start:stop]) for start, stop in edges], np.int64)


def overlong_error(stage: TrainStage, i: int, name: str, row: dict, length: int, others: str, policies: str):
    return UserError(
        f"{where_of(i, row)} (source {name}): has {length} tokens, above max_seq_len={stage.max_seq_len}{others}; "
        f"raise max_seq_len or set overlong to {policies}"
    )


def check_not_empty(stage: TrainStage, rows: Rows) -> None:
    if not rows:
        raise UserError(f"data={stage.data} gives no rows to prepare; expected at least one")


def check_trained(sources: dict[str, dict]) -> None:
    """Refuse a source of which nothing is left to train on."""
    for name, entry in sources.items():
        if not entry["tokens_trained"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in entry["dropped"].items())
            raise UserError(
                f"source {name}: none of its {entry['rows_read']} rows has a trained token ({reasons}); "
                "check its roles and train flags, raise max_seq_len, or remove it from the mixture"
            )
