"""Prepared rows of random tokens, for measuring speed where nothing has been prepared."""

import numpy as np
from datasets import Dataset, Features, List, Value

from smolpost.chat.fates import Fate
from smolpost.data.collate import PARTS
from smolpost.data.packing import best_fit_decreasing, unpacked, wrapped
from smolpost.training.settings import Training

MEDIAN, SPREAD = 512, 1.0  # of log-normal lengths: tokens, and the standard deviation of their logarithm
LAYOUTS = ("documents", "pairs")


def generated_rows(stage: Training, number: int, vocab_size: int) -> Dataset:
    """Packs of documents, the later half of each trained, or preference pairs, whose sides are trained.

    Lengths of documents, and of each part of a pair, are log-normal and at most what a row has room for.

    Args:
        stage: Its layout is one of LAYOUTS.
        number: Of rows.
        vocab_size: Token ids are below it.
    """
    draw = np.random.default_rng(0)
    return (_packs if stage.layout == "documents" else _pairs)(stage, number, vocab_size, draw)


def _packs(stage: Training, number: int, vocab_size: int, draw: np.random.Generator) -> Dataset:
    most = stage.max_seq_len
    lengths = _lengths(draw, 2 * number * (1 + most // MEDIAN), most)  # more than fill the packs
    if stage.packing == "none":
        plan = unpacked(lengths)
    else:
        plan = wrapped(lengths, most) if stage.packing == "wrapped" else best_fit_decreasing(lengths, most)
    rows = []
    for pack in np.split(plan.piece_lengths(), plan.pack_offsets[1:-1])[:number]:
        fates = []
        for length in pack.tolist():
            trained = length // 2
            fates += [Fate.FIRST] + [Fate.USER] * (length - trained - 1) + [Fate.TRAINED] * trained
        ids = draw.integers(0, vocab_size, len(fates))
        rows.append({"input_ids": ids, "fates": fates, "seq_lengths": pack})
    return _dataset(rows, {"input_ids": "int32", "fates": "int8", "seq_lengths": "int32"})


def _pairs(stage: Training, number: int, vocab_size: int, draw: np.random.Generator) -> Dataset:
    rows = []
    for lengths in _lengths(draw, (number, len(PARTS)), stage.max_seq_len // 2).tolist():
        row = {}
        for part, length in zip(PARTS, lengths, strict=True):
            row[f"{part}_ids"] = draw.integers(0, vocab_size, length)
            row[f"{part}_mask"] = [int(part != "prompt")] * length
        rows.append(row)
    types = {f"{part}_{what}": dtype for part in PARTS for what, dtype in (("ids", "int32"), ("mask", "int8"))}
    return _dataset(rows, types)


def _lengths(draw: np.random.Generator, number: int | tuple[int, int], most: int) -> np.ndarray:
    """Log-normal lengths from 2 to `most`, or 1 where that is all there is room for."""
    return np.clip(np.exp(draw.normal(np.log(MEDIAN), SPREAD, number)).astype(np.int64), min(2, most), most)


def _dataset(rows: list[dict], types: dict[str, str]) -> Dataset:
    return Dataset.from_list(rows, features=Features({name: List(Value(dtype)) for name, dtype in types.items()}))
