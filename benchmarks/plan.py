"""What a command costs before its work begins, on a recipe with 20 GB of data files.

python benchmarks/plan.py [--quick] [--before FOLDER]; the files are sparse, in a temporary folder (TMPDIR chooses the
disk)

Keys of stages hang on the content of the data files, whose hashes are kept in the pipeline's folder. `plan` is the
command as a user types it. A rank's start is what `smolpost.train` does before it trains: it reads the recipe and finds
its stage's folder. FOLDER is a checkout of an earlier version, measured beside this one.

Cold: the files' pages are dropped from the page cache first. Those of a sparse file come back without a disk.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import ROOT, keep, options, show

SHARES = {"mid": 0.4, "sft": 0.4, "preference": 0.2}  # of the bytes
RANK = """
import sys
from smolpost import recipe
from smolpost.pipeline.lineage import Lineage
print(Lineage(recipe.load(sys.argv[1:])).stages["sft"].folder)
"""


def write_files(folder: Path, num_bytes: int) -> list[Path]:
    """Files of zeros: only their content's hash is asked for."""
    files = []
    for name, share in SHARES.items():
        files.append(folder / f"smoltalk2_{name}.jsonl")
        files[-1].touch()
        os.truncate(files[-1], int(share * num_bytes))
    time.sleep(3)  # hashes of files that have just changed are not kept
    return files


def drop_pages(files: list[Path]) -> None:
    for file in files:
        opened = os.open(file, os.O_RDONLY)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def seconds(checkout: Path, command: list[str], words: list[str]) -> dict:
    """Wall clock, and processor time of the process."""
    began, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, *command, *words], cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": time.perf_counter() - began, "cpu_seconds": cpu}


def measure(side: str, checkout: Path, files: list[Path], run_dir: Path) -> list[dict]:
    words = ["pipeline=gsm8k", "evaluation=none", f"data_root={files[0].parent}", f"run_dir={run_dir}"]
    if (checkout / "recipes" / "data" / "gsm8k_folder.yaml").is_file():  # earlier versions read the folder by default
        words.append("data=gsm8k_folder")
    plan, rank = ["-m", "smolpost.cli", "plan"], ["-c", RANK]
    rows = []
    for case, command, cold in (
        ("plan, a new run folder", plan, False),
        ("plan again", plan, False),
        ("plan again, cold", plan, True),
        ("a rank's start", rank, False),
        ("a rank's start, cold", rank, True),
    ):
        if cold:
            drop_pages(files)
        rows.append({"case": case, "side": side} | seconds(checkout, command, words))
        print(f"  {side}, {case}: {rows[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    arguments = options(__doc__.splitlines()[0], folders={"before": "checkout of an earlier version, measured too"})
    gigabytes = 1 if arguments.quick else 20
    sides = {"smolpost": ROOT} | ({"before": arguments.before.resolve()} if arguments.before else {})
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), gigabytes * 10**9)
        rows = [
            row
            for number, (side, checkout) in enumerate(sides.items())
            for row in measure(side, checkout, files, Path(folder) / f"runs-{number}")
        ]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    rows.sort(key=lambda row: cases.index(row["case"]))
    show(f"{gigabytes} GB of data files in three files", rows)
    keep("plan", arguments, rows)


if __name__ == "__main__":
    main()
