"""What `accelerate launch -m smolpost.bench FOLDER STEPS pipeline=... stage=...` runs, once per rank."""

import sys
from pathlib import Path

from smolpost.train import main


def bench_stage(rank: int) -> None:
    """The stage of the command line, on the start and rows that `smolpost bench` has put into a folder."""
    from smolpost import recipe  # here, as these imports take seconds in which a signal ends in one line, too
    from smolpost.pipeline import bench

    folder, steps, *words = sys.argv[1:]
    bench.measure(recipe.load(words), Path(folder), int(steps))


if __name__ == "__main__":
    main(bench_stage)
