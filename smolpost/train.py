"""What `accelerate launch -m smolpost.train pipeline=... stage=...` runs, once per rank."""

import os
import sys
import time
from collections.abc import Callable

from smolpost.cli import one_line_errors
from smolpost.errors import UserError
from smolpost.signals import Stopped, exit_code

GRACE = 30  # seconds


def main(work: Callable[[int], None] | None = None) -> None:
    """
    Args:
        work: What a rank does; None: train the stage of the command line.
    """
    try:
        with one_line_errors():
            on_rank(work or run_stage)
        code = 0
    except SystemExit as end:
        code = end.code
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Not through Python's own end: a gloo thread that still frees its last tensors would meet it and abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def on_rank(work: Callable[[int], None]) -> None:
    """Rank 0 says for all that they were stopped, and what is wrong."""
    rank = int(os.environ.get("RANK", 0))
    try:
        try:
            work(rank)
        except UserError:
            if rank:
                # The launcher ends this rank with rank 0; were this one first, rank 0 would end before it has said
                # anything. A fault of this rank alone is said after all.
                time.sleep(GRACE)
            raise
    except Stopped as stop:  # also while this rank waits to be ended
        if rank:
            sys.exit(exit_code(stop.signum))
        raise


def run_stage(rank: int) -> None:
    """Train the stage of the command line."""
    from smolpost import recipe  # here, as these imports take seconds in which a signal ends in one line, too
    from smolpost.pipeline import steps
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one
    from smolpost.training import build_locks

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # it builds its kernels at its start
        for lock in build_locks.remove_stale():
            print(f"removed {lock}, which a killed build has left", flush=True)
    lineage = Lineage(request := recipe.load(sys.argv[1:]), look_up=True)
    stage = select_one(lineage.stages.planned.values(), request.stage)
    steps.make_on_ranks(lineage, lineage.stages[stage.name], rank)


if __name__ == "__main__":
    main()
