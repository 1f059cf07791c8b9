"""Packing plan: whole-dataset best-fit decreasing by length classes beside TRL's pack_dataset, in alternation.

python benchmarks/packing.py [--quick]

Log-normal document lengths (mu 6.5, sigma 1.2), clipped to the row. TRL packs per `map` batch of 1000 rows by default;
"one batch" gives it the whole dataset at once. TRL also moves the tokens; ours is the plan alone.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from trl.data_utils import pack_dataset

from smolpost.data.packing import best_fit_decreasing

CAPACITY = 65536
RESULTS = Path(__file__).parent / "results" / "packing.json"


def documents(number: int) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(6.5, 1.2, number)
    return np.clip(lengths.astype(np.int64), 1, CAPACITY)


def as_dataset(lengths: np.ndarray) -> datasets.Dataset:
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = np.zeros(offsets[-1], np.int32)
    return datasets.Dataset(pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, tokens)}))


def seconds(work) -> tuple[float, object]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def compare(number: int, repeats: int) -> dict:
    lengths = documents(number)
    rows = as_dataset(lengths)
    datasets.disable_caching()
    sides = {
        "smolpost": lambda: best_fit_decreasing(lengths, CAPACITY).num_packs,
        "trl": lambda: len(pack_dataset(rows, CAPACITY, "bfd")),
        "trl, one batch": lambda: len(pack_dataset(rows, CAPACITY, "bfd", {"batch_size": number})),
    }
    times, packs = {name: [] for name in sides}, {}
    for _ in range(repeats):
        for name, work in sides.items():
            took, packs[name] = seconds(work)
            times[name].append(took)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "documents": number, "tokens": int(lengths.sum()), "lower_bound_packs": -(-int(lengths.sum()) // CAPACITY),
        "seconds": medians, "packs": packs,
        "ratio": {name: medians[name] / medians["smolpost"] for name in sides if name != "smolpost"},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sets, under a minute")
    quick = parser.parse_args().quick
    datasets.disable_progress_bars()
    found = [compare(number, 3) for number in ((20_000,) if quick else (100_000,))]
    for number in (1_000_000,) if quick else (1_000_000, 10_000_000):
        lengths = documents(number)
        runs = [seconds(lambda lengths=lengths: best_fit_decreasing(lengths, CAPACITY)) for _ in range(3)]
        median = statistics.median(took for took, _ in runs)
        found.append({"documents": number, "seconds": {"smolpost": median}, "packs": runs[0][1].num_packs})
    for result in found:
        print(json.dumps(result))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"capacity": CAPACITY, "quick": quick, "results": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
