"""Packing side by side with TRL: the plan alone, and the packed training set written to disk with its tokens.

python benchmarks/packing.py [--quick]; the rows and both outputs lie in a temporary folder (TMPDIR chooses the disk)

Document lengths are log-normal (mu 6.5, sigma 1.2) and clipped to the row: TRL would cut longer ones in silence. TRL
packs per `map` batch of 1000 rows, as its user gets it; "one batch" gives it the whole dataset at once.

Plan: ours from lengths alone. TRL cannot plan without moving tokens, so here its tokens are one byte each.
Set: each side starts from the same tokenized rows in files, memory-mapped and in the page cache, and ends with a
`datasets` dataset in a file. TRL writes ids and labels, int32. Ours runs what `smolpost prepare` runs once its rows are
tokenized: it writes ids, int32, and the fate of each token, int8, from which the labels follow.
Peak memory counts what a side imports and the file pages it has mapped.
"""

import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from side_by_side import alternate, keep, one_run, options, run_side, show

CAPACITY = 65536
VOCABULARY = 128256
TRL_BATCH = 1000  # rows of one `map` batch, by default
COLUMNS = {"input_ids": "int32", "labels": "int32"}
IDS_ONLY = "trl, ids only"
ONE_BATCH = "trl, one batch"


def lengths_of(number: int) -> np.ndarray:
    lengths = np.random.default_rng(0).lognormal(6.5, 1.2, number)
    return np.clip(lengths.astype(np.int64), 2, CAPACITY)  # the first token is never trained, so one more


def timed(work) -> tuple[dict, object]:
    """({seconds, cpu_seconds of all threads}, result)."""
    os.sync()  # no one pays for another's dirty pages
    began, cpu = time.perf_counter(), time.process_time()
    result = work()
    return {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}, result


# ---------------------------------------------------------------- the plan alone


def plan_smolpost(case: dict) -> dict:
    from smolpost.data.packing import best_fit_decreasing

    lengths = lengths_of(case["documents"])
    clock, plan = timed(lambda: best_fit_decreasing(lengths, CAPACITY))
    return clock | {"packs": plan.num_packs}


def plan_trl(case: dict, **map_kwargs) -> dict:
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    offsets = np.concatenate(([0], np.cumsum(lengths_of(case["documents"]))))
    tokens = pa.LargeListArray.from_arrays(offsets, np.zeros(offsets[-1], np.int8))
    rows = datasets.Dataset(pa.table({"input_ids": tokens}))
    clock, packs = timed(lambda: pack_dataset(rows, CAPACITY, "bfd", map_kwargs))
    return clock | {"packs": len(packs)}


def plan_trl_one_batch(case: dict) -> dict:
    return plan_trl(case, batch_size=case["documents"])


# ---------------------------------------------------------------- the packed training set


def write_rows(folder: Path, number: int) -> None:
    """Tokenized rows, a third of each a prompt: as arrays for us, as a dataset in TRL's own batches for TRL."""
    from smolpost.data.dataset_folder import write_dataset
    from smolpost.data.tokenize import BATCH_ROWS, SCHEMA

    lengths = lengths_of(number)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    prompt = np.maximum(lengths // 3, 1)
    ids = np.random.default_rng(1).integers(VOCABULARY, size=offsets[-1], dtype=np.int32)
    trained = np.repeat(np.tile([False, True], number), np.stack((prompt, lengths - prompt), axis=1).ravel())

    def batches():
        for first, last in pairwise([*range(0, number, TRL_BATCH), number]):
            span = slice(offsets[first], offsets[last])
            labels = np.where(trained[span], ids[span], -100)
            yield {"input_ids": (ids[span], lengths[first:last]), "labels": (labels, lengths[first:last])}

    (folder / "rows").mkdir()
    write_dataset(folder / "rows", COLUMNS, batches())
    with pa.ipc.new_file(str(folder / "tokens.arrow"), SCHEMA) as writer:
        for first, last in pairwise([*range(0, number, BATCH_ROWS), number]):
            writer.write_batch(token_batch(ids, trained, offsets[first : last + 1]))


def token_batch(ids: np.ndarray, trained: np.ndarray, offsets: np.ndarray) -> pa.RecordBatch:
    """Rows as `smolpost prepare` leaves them tokenized."""
    from smolpost.chat.fates import Fate
    from smolpost.data.tokenize import SCHEMA

    span, number = slice(offsets[0], offsets[-1]), len(offsets) - 1
    fates = np.where(trained[span], Fate.TRAINED, Fate.USER).astype(np.int8)
    starts = (offsets[:-1] - offsets[0]).astype(np.int32)
    fates[starts] = Fate.FIRST
    edges = pa.array(np.append(starts, offsets[-1] - offsets[0]).astype(np.int32))
    lengths, counts = np.diff(offsets), np.zeros((number, len(Fate)), np.int64)
    counts[:, Fate.TRAINED] = np.add.reduceat(fates == Fate.TRAINED, starts, dtype=np.int64)
    counts[:, Fate.FIRST], counts[:, Fate.USER] = 1, lengths - 1 - counts[:, Fate.TRAINED]
    zeros, no = np.zeros(number, np.int64), np.zeros(number, bool)
    columns = {
        "path": ["rows"] * number, "number": zeros, "ids": pa.ListArray.from_arrays(edges, ids[span]),
        "fates": pa.ListArray.from_arrays(edges, fates), "parts": lengths[:, None].astype(np.int32).tolist(),
        "fate_counts": pa.FixedSizeListArray.from_arrays(counts.ravel(), len(Fate)), "is_text": no, "think": no,
        "unknown": zeros, "neutralised": zeros, "content": zeros.astype(np.uint64), "features": [None] * number,
    }  # fmt: skip
    arrays = [pa.array(column, SCHEMA.field(name).type) if not isinstance(column, pa.Array) else column
              for name, column in columns.items()]  # fmt: skip
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def set_smolpost(case: dict) -> dict:
    from smolpost.data import prepare_documents
    from smolpost.data.dataset_folder import write_dataset
    from smolpost.data.tokens import open_tokens
    from smolpost.stages.sft import SFTStage

    folder, out = Path(case["folder"]), output("smolpost", case)
    stage = SFTStage(init_from="x", data="y", max_seq_len=CAPACITY, learning_rate=1e-4, global_batch_size=1)

    def work():
        tokens = open_tokens([folder / "tokens.arrow"])
        documents = prepare_documents.whole_rows(tokens, np.arange(len(tokens)))
        _, pieces, plan = prepare_documents.pack(stage, tokens, documents)
        write_dataset(
            out.parent, prepare_documents.PACK_TYPES, prepare_documents.pack_chunks(tokens, pieces, plan, None)
        )
        return datasets.load_from_disk(out.parent)

    clock, packs = timed(work)
    return clock | {"packs": len(packs)}


def set_trl(case: dict, side: str = "trl", columns: tuple[str, ...] = tuple(COLUMNS)) -> dict:
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    rows = datasets.load_from_disk(f"{case['folder']}/rows").select_columns(list(columns))
    cache = {"cache_file_name": str(output(side, case))}
    clock, packs = timed(lambda: pack_dataset(rows, CAPACITY, "bfd", cache))
    return clock | {"packs": len(packs)}


def set_trl_ids_only(case: dict) -> dict:
    return set_trl(case, IDS_ONLY, ("input_ids",))


def output(side: str, case: dict) -> Path:
    """The Arrow file a side writes, not there yet."""
    file = Path(case["folder"]) / side / "data-00000-of-00001.arrow"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    return file


def check(case: dict) -> dict:
    """Refuse a side whose packs are overfull or do not hold the documents and tokens of the rows."""
    folder = Path(case["folder"])
    expected = contents(folder / "rows")
    for side in ("smolpost", "trl", IDS_ONLY):
        found = contents(folder / side)
        assert found["longest"] <= CAPACITY, (side, found)
        for key in ("tokens", "documents", "input_ids") + (() if side == IDS_ONLY else ("labels",)):
            assert found[key] == expected[key], (side, key, found, expected)
    return {"tokens": expected["tokens"]}


def contents(folder: Path) -> dict:
    """Tokens, sums of ids and labels, a digest of the document lengths, and the longest row of a dataset's file."""
    from smolpost.chat.fates import Fate

    found = {"tokens": 0, "input_ids": 0, "labels": 0, "longest": 0}
    documents = np.zeros(CAPACITY + 1, np.int64)  # of each length
    for batch in datasets.Dataset.from_file(str(next(folder.glob("data-*.arrow")))).data.to_batches():
        lengths = pc.list_value_length(batch["input_ids"])
        found["tokens"] += pc.sum(lengths).as_py()
        found["longest"] = max(found["longest"], pc.max(lengths).as_py())
        columns = {name: batch[name].flatten().to_numpy() for name in batch.schema.names if name != "seq_lengths"}
        if "fates" in columns:
            columns["labels"] = np.where(columns["fates"] == Fate.TRAINED, columns["input_ids"], -100)
        for key in set(COLUMNS) & set(columns):
            found[key] += int(columns[key].sum(dtype=np.int64))
        parts = batch["seq_lengths"].flatten() if "seq_lengths" in batch.schema.names else lengths
        documents += np.bincount(parts.to_numpy(), minlength=CAPACITY + 1)
    return found | {"documents": hash(documents.tobytes())}


# ---------------------------------------------------------------- both

PLANS = {"smolpost": plan_smolpost, "trl": plan_trl, ONE_BATCH: plan_trl_one_batch}
SETS = {"smolpost": set_smolpost, "trl": set_trl, IDS_ONLY: set_trl_ids_only}
SIDES = {f"plan {side}": run for side, run in PLANS.items()} | {f"set {side}": run for side, run in SETS.items()}


def compare(name: str, number: int, sides: list[str], case: dict, arguments) -> dict:
    """One case: the sides' medians, and each peer's cost over ours."""
    found = alternate(sides, case | {"documents": number}, arguments)
    ours = found[sides[0]]
    ratios = {
        side: {key: peer[key] / ours[key] for key in ("seconds", "cpu_seconds", "peak_gb", "packs")}
        for side, peer in found.items()
        if peer is not ours
    }
    settings = {"documents": number, "tokens": int(lengths_of(number).sum()), "capacity": CAPACITY, **case}
    return {"case": name, "settings": settings, "sides": found, "peer_over_ours": ratios}


def table_of(result: dict) -> list[dict]:
    rows, number = [], result["settings"]["documents"]
    for side, found in result["sides"].items():
        ratio = result["peer_over_ours"].get(side, {})
        measured = {"case": result["case"], "side": side.split(" ", 1)[1], "seconds": found["seconds"]}
        measured |= {"x ours": ratio.get("seconds"), "CPU s": found["cpu_seconds"], "x CPU": ratio.get("cpu_seconds")}
        measured |= {"rows/s": number / found["seconds"], "packs": int(found["packs"]), "peak GB": found["peak_gb"]}
        rows.append(measured)
    return rows


def targets_of(results: dict[str, dict]) -> list[dict]:
    """What was asked of the full run."""
    plan, packed_set = (
        results["plan 1M"]["peer_over_ours"]["plan trl"],
        results["set 100k"]["peer_over_ours"]["set trl"],
    )
    fewer = 100 * (1 - 1 / packed_set["packs"])
    seconds = results["plan 10M"]["sides"]["plan smolpost"]["seconds"]
    return [
        target("plan 1M: rows per second over TRL's", plan["seconds"], plan["seconds"] >= 50, ">= 50"),
        target("plan 10M: seconds", seconds, seconds <= 3, "<= 3"),
        target("set 100k: TRL's seconds over ours", packed_set["seconds"], packed_set["seconds"] >= 3, ">= 3"),
        target("set 100k: packs fewer than TRL's, percent", fewer, fewer >= 2, ">= 2"),
    ]


def target(name: str, found: float, met: bool, limit: str) -> dict:
    return {"target": name, "limit": limit, "found": found, "met": met}


def disk_of(folder: str) -> str:
    """Device and file system a folder lies on."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [mount for mount in mounts if Path(folder).is_relative_to(mount[1])]
    device, _, kind = max(above, key=lambda mount: len(mount[1]))
    return f"{device}, {kind}"


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    if run_side(SIDES | {"check": check}, arguments):
        return
    plans = {"plan 100k": (100_000, list(PLANS)), "plan 1M": (1_000_000, ["smolpost", "trl"])}
    plans["plan 10M"] = (10_000_000, ["smolpost"])
    name, number = "set 100k", 100_000
    if arguments.quick:
        arguments.repeats, name, number = 1, "set 20k", 20_000
        plans = {"plan 20k": (number, ["smolpost", "trl"]), "plan 1M": (1_000_000, ["smolpost"])}
    results = {
        plan: compare(plan, rows, [f"plan {side}" for side in sides], {}, arguments)
        for plan, (rows, sides) in plans.items()
    }
    with tempfile.TemporaryDirectory(prefix="smolpost-bench-") as folder:
        write_rows(Path(folder), number)
        results[name] = compare(name, number, [f"set {side}" for side in SETS], {"folder": folder}, arguments)
        one_run("check", {"folder": folder}, arguments)
        disk = disk_of(folder)
    results[name]["settings"]["folder"] = disk
    table = [row for result in results.values() for row in table_of(result)]
    show(f"Packing, smolpost beside TRL; the set on {disk}", table)
    if arguments.quick:
        return
    targets = targets_of(results)
    show("Targets", targets)
    keep("packing", arguments, [*results.values(), {"case": "targets", "targets": targets}])


if __name__ == "__main__":
    main()
