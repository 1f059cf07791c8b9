"""What is claimed of one GPU, measured in one process: SFT, LoRA and APO of SmolLM3-3B's shapes beside TRL.

python benchmarks/gpu.py [--minutes 8] [--only WORDS] [--data FOLDER] [--quick]

The sides of each case run in turn. They run again, round after round, until the minutes are over; medians are shown.
Models have random weights and are made on the device, and no checkpoints are written. --quick runs the same cases with
a toy model, on any device, and keeps no results: it shows that the benchmark itself works. benchmarks/head.py,
generation.py and checkpoint.py measure the head, generation and checkpoints.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import apo
import sft
import torch
from side_by_side import RESULTS, ROOT, machine, show
from workload import SMALL, SMOLLM3_3B, Side, sides_of

from smolpost.training.settings import LoRA

OUR_NAME, TRL_NAME, LIGER_NAME, PRECOMPUTED_NAME = "smolpost", "trl", "trl, liger", "trl, precomputed"
FULL, OFFLOAD, LORA = "full", "offload", "lora r=16"


class Target(NamedTuple):
    """A number that a side has to reach.

    Attributes:
        side: Which has to reach it.
        measure: rate (tokens or pairs a second), matmul_share or peak_gpu_gb.
        limit: At least this, or at most where the measure is peak_gpu_gb.
        than: The other side, where the limit is a multiple of its number.
    """

    side: str
    measure: str
    limit: float
    than: str | None = None

    def verdict(self, sides: dict[str, dict]) -> dict:
        """The row of the table of targets."""
        wanted = f"{self.limit:,g}" + (f" x {self.than}" if self.than else "")
        row = {"side": self.side, "measure": self.measure, "target": wanted}
        needed = [sides.get(name) for name in (self.side, self.than) if name]
        if any(side is None or self.measure not in side for side in needed):
            return row | {"found": None, "verdict": "not measured"}
        found = needed[0][self.measure] / (needed[1][self.measure] if self.than else 1)
        met = found <= self.limit if self.measure == "peak_gpu_gb" else found >= self.limit
        return row | {"found": found, "verdict": "met" if met else "missed"}


class Case(NamedTuple):
    """Sides that train on the same rows.

    Attributes:
        benchmark: Its `measure` runs a side.
        unit: That a rate counts: tokens or pairs.
        case: Of that benchmark.
    """

    benchmark: object
    unit: str
    case: dict
    sides: dict[str, Side]
    targets: list[Target]


def ours(**settings) -> Side:
    return Side("smolpost", settings=settings)


def cases(data: Path, device: str, quick: bool) -> dict[str, Case]:
    shared = {"device": device, "model": SMALL if quick else SMOLLM3_3B, "vocab": 8192 if quick else 128256}
    scale = 16 if quick else 1
    packs = shared | {"file": str(data / "gsm8k" / "smoltalk2_sft.jsonl"), "rows": 200 if quick else None}
    short, long = packs | {"length": 16384 // scale, "steps": 8}, packs | {"length": 65536 // scale, "steps": 3}
    pairs = shared | {"file": str(data / "gsm8k" / "smoltalk2_preference.jsonl"), "rows": 160, "batch": 32}
    dialogs = shared | {"file": str(data / "tau_airline" / "preference.jsonl"), "rows": 12, "batch": 4}
    if quick:
        pairs, dialogs = pairs | {"rows": 24, "batch": 4}, dialogs | {"rows": 4, "batch": 1}
        short, long, pairs, dialogs = (case | {"steps": 2} for case in (short, long, pairs, dialogs))
    trl, mine = Side("trl"), ours(activation_checkpointing="auto")
    return {
        "SFT, packs of 16,384": Case(
            sft,
            "tokens",
            short,
            {
                OUR_NAME: mine,
                FULL: ours(activation_checkpointing="full"),
                OFFLOAD: ours(activation_checkpointing="offload"),
                LORA: ours(activation_checkpointing="full", lora=LoRA(r=16)),
                LIGER_NAME: Side("trl", liger=True),
                TRL_NAME: trl,
            },
            [
                Target(OUR_NAME, "rate", 25_000),
                Target(OUR_NAME, "matmul_share", 0.55),
                Target(OUR_NAME, "rate", 1.3, than=LIGER_NAME),
                Target(FULL, "peak_gpu_gb", 51.6),
                Target(OFFLOAD, "peak_gpu_gb", 50.0),
                Target(LORA, "rate", 1.2, than=FULL),
                Target(LORA, "peak_gpu_gb", 25.0),
            ],
        ),
        "APO, gsm8k pairs": Case(
            apo,
            "pairs",
            {"steps": 4} | pairs | {"pack_tokens": 16384 // scale, "trl_micro_batch": 4},
            {OUR_NAME: mine, TRL_NAME: trl, PRECOMPUTED_NAME: Side("trl", precompute=True)},
            [Target(OUR_NAME, "rate", 8, than=TRL_NAME), Target(OUR_NAME, "rate", 5, than=PRECOMPUTED_NAME)],
        ),
        "APO, tau airline pairs": Case(
            apo,
            "pairs",
            {"steps": 2} | dialogs | {"pack_tokens": 16384 // scale, "trl_micro_batch": 1},
            {OUR_NAME: mine, TRL_NAME: trl},
            [Target(OUR_NAME, "rate", 3, than=TRL_NAME)],
        ),
        "SFT, packs of 65,536": Case(
            sft,
            "tokens",
            long,
            {OUR_NAME: ours(activation_checkpointing="full")},
            [Target(OUR_NAME, "matmul_share", 0.55), Target(OUR_NAME, "peak_gpu_gb", 64.0)],
        ),
    }


def run(case: Case, side: Side) -> dict:
    """One run of a side; its numbers, or what ended it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        found = case.benchmark.measure(side, case.case)
    except torch.OutOfMemoryError as error:
        return {"failed": str(error).splitlines()[0]}
    rate = found["model_flops"] / found["seconds"] / 1e12
    return found | {
        "rate": found[case.unit] / found["seconds"],
        "needed_tflops": rate,
        "matmul_share": rate / found["matmul_tflops"],
    }


def median(runs: list[dict]) -> dict:
    """The median of each number over the runs. If one run failed, the side has no numbers, only the reason."""
    if failed := [found for found in runs if "failed" in found]:
        return failed[0]
    return {key: statistics.median(found[key] for found in runs) for key in runs[0]}


def print_case(name: str, case: Case, sides: dict[str, dict], *, with_targets: bool) -> None:
    rows = [
        {
            "side": side,
            f"{case.unit}/s": found.get("rate"),
            "needed TFLOP/s": found.get("needed_tflops"),
            "of matmul rate": found.get("matmul_share"),
            "peak GB": found.get("peak_gpu_gb"),
            "last loss": found.get("loss_last"),
            "failed": found.get("failed"),
        }
        for side, found in sides.items()
    ]
    show(name, rows)
    if with_targets:
        show(f"{name}: targets", [target.verdict(sides) for target in case.targets])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="no side starts after these; the first round may")
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose name holds these words")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of gsm8k/ and tau_airline/"
    )
    parser.add_argument("--quick", action="store_true", help="a toy model, on any device; results are not kept")
    found = parser.parse_args()
    if not torch.cuda.is_available() and not found.quick:
        print("no CUDA device here: skipped; --quick runs the cases with a toy model")
        sys.exit(0)
    if not found.data.is_dir():
        print(f"--data {found.data} is not a folder; the rows of gsm8k and tau_airline are needed", file=sys.stderr)
        sys.exit(2)
    return found


def main() -> None:
    arguments, began = options(), time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    chosen = {n: c for n, c in cases(arguments.data, device, arguments.quick).items() if arguments.only in n}
    if not chosen:
        print(f"--only {arguments.only!r} is in no case's name", file=sys.stderr)
        sys.exit(2)
    runs = {(name, side): [] for name, case in chosen.items() for side in sides_of(case.sides, device)}
    took: dict[tuple[str, str], float] = {}
    for round_ in range(1 if arguments.quick else 100):
        for (name, side), found in runs.items():
            now = time.monotonic()
            if round_ and now - began + took[name, side] > 60 * arguments.minutes:
                continue
            found.append(run(chosen[name], sides_of(chosen[name].sides, device)[side]))
            took[name, side] = time.monotonic() - now
            print(f"  round {round_ + 1}, {name}, {side}: {took[name, side]:.0f} s", file=sys.stderr, flush=True)
        if time.monotonic() - began + min(took.values()) > 60 * arguments.minutes:
            break
    print(f"{card}, torch {torch.__version__}, {time.monotonic() - began:.0f} s")
    results = []
    for name, case in chosen.items():
        sides = {side: median(found) for (of, side), found in runs.items() if of == name}
        print_case(name, case, sides, with_targets=not arguments.quick)
        verdicts = [target.verdict(sides) for target in case.targets]
        every = {side: found for (of, side), found in runs.items() if of == name}
        results.append({"case": name, "settings": case.case, "sides": sides, "runs": every, "targets": verdicts})
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        content = {"card": card, "machine": machine(), "results": results}
        (RESULTS / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
