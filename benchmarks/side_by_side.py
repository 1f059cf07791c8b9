"""What the benchmarks share: each side runs in a process of its own, in alternation, and medians are printed and kept.

A benchmark file is run by a user without `--side`; it calls itself once per run with `--side NAME --case JSON`, and
that process prints one line of JSON: what it measured.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "trl", "datasets")


def options(
    summary: str, *, folders: dict[str, str] | None = None, needs_data: bool = True, **switches: str
) -> argparse.Namespace:
    """What was asked on the command line; `switches` are flags of the benchmark's own with their help, `folders` its
    options that take a folder."""
    parser = argparse.ArgumentParser(description=summary)
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    for name, text in (folders or {}).items():
        parser.add_argument(f"--{name}", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--quick", action="store_true", help="a small case, under a minute; results are not kept")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of gsm8k/ and tau_airline/"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; medians are shown")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device here: skipped")
            sys.exit(0)
    if needs_data and not found.data.is_dir():
        print(f"--data {found.data} is not a folder; the rows of gsm8k and tau_airline are needed", file=sys.stderr)
        sys.exit(2)
    return found


def run_side(sides: dict[str, Callable[[dict], dict]], arguments: argparse.Namespace) -> bool:
    """In a child process: measure one side and print it. False in the parent."""
    if arguments.side is None:
        return False
    measured = sides[arguments.side](json.loads(arguments.case))
    # macOS counts bytes, Linux KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    measured["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    print(json.dumps(measured))
    return True


def alternate(names: list[str], case: dict, arguments: argparse.Namespace) -> dict[str, dict]:
    """Median of every number that the sides print, over `--repeats` rounds of all sides in turn."""
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            runs[name].append(one_run(name, case, arguments))
    return {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} | {"runs": found}
        for name, found in runs.items()
    }


def one_run(name: str, case: dict, arguments: argparse.Namespace) -> dict:
    words = [sys.executable, sys.argv[0], "--side", name, "--case", json.dumps(case)]
    words += ["--data", str(arguments.data), "--device", arguments.device]
    began = time.monotonic()
    # Threads that spin while they wait take the core from one another on a busy machine: 14x slower was seen. Both
    # sides get what `smolpost run` sets.
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    print(f"  {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def compared(what: str, unit: str, name: str, case: dict, sides: dict[str, dict], target: dict | None) -> dict:
    """Show the first side, ours, beside the others; the entry for `keep`.

    Args:
        what, name: What was trained, and the case: the table's title.
        unit: Of speed: tokens or pairs, a number that every side has measured.
        sides: From `alternate`.
    """
    ours, *peers = sides
    memory = "peak_gpu_gb" if case["device"] == "cuda" else "peak_gb"
    speed = {side: found[unit] / found["seconds"] for side, found in sides.items()}
    ratio = {
        side: {"speed": speed[ours] / speed[side], "memory": sides[side][memory] / sides[ours][memory]}
        for side in peers
    }
    table = [
        {
            "side": side,
            f"{unit}/s": speed[side],
            "peak GB": found[memory],
            "CPU s": found["cpu_seconds"],
            "last loss": found["loss_last"],
            "reference s": found.get("reference_seconds"),
            "2nd seed s": found.get("second_seed_seconds"),
            "needed TFLOP/s": (rate := found["model_flops"] / found["seconds"] / 1e12),
            "of matmul rate": rate / found["matmul_tflops"],
        }
        for side, found in sides.items()
    ]
    for side, than in ratio.items():
        table.append({"side": f"ratio to {side}", f"{unit}/s": than["speed"], "peak GB": than["memory"]})
    show(f"{what}, {name}; target {target}", table)
    return {"case": name, "settings": case, "sides": sides, "ratio": ratio, "target": target}


def machine() -> dict:
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def show(title: str, rows: list[dict]) -> None:
    """A table with the union of the rows' keys as columns, but for those without a value."""
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("case", "side") else "right")
    for row in rows:
        table.add_row(*(shown(row.get(column)) for column in columns))
    Console(width=max(120, Console().width)).print(table)


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


def keep(name: str, arguments: argparse.Namespace, results: list[dict]) -> None:
    """Write results/NAME.json, unless the run was quick."""
    if arguments.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    suffix = "" if arguments.device == "cpu" else f"-{arguments.device}"
    content = {"machine": machine(), "device": arguments.device, "repeats": arguments.repeats, "results": results}
    (RESULTS / f"{name}{suffix}.json").write_text(json.dumps(content, indent=2) + "\n")
