"""What `accelerate launch -m smolpost.train pipeline=... stage=...` runs, once per rank."""

import os
import sys
import time

from smolpost.cli import one_line_errors
from smolpost.errors import UserError
from smolpost.signals import Stopped, exit_code

GRACE = 30  # seconds


def main() -> None:
    try:
        with one_line_errors():
            train()
        code = 0
    except SystemExit as end:
        code = end.code
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Not through Python's own end: a gloo thread that still frees its last tensors would meet it and abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def train() -> None:
    """The stage of the command line; rank 0 says for all that they were stopped."""
    rank = int(os.environ.get("RANK", 0))
    try:
        run_stage(rank)
    except Stopped as stop:
        if rank:
            sys.exit(exit_code(stop.signum))
        raise


def run_stage(rank: int) -> None:
    """Rank 0 says for all what is wrong."""
    from smolpost import recipe  # here, as these imports take seconds in which a signal ends in one line, too
    from smolpost.pipeline import steps
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one
    from smolpost.training import build_locks

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # it builds its kernels at its start
        for lock in build_locks.remove_stale():
            print(f"removed {lock}, which a killed build has left", flush=True)
    try:
        lineage = Lineage(request := recipe.load(sys.argv[1:]))
        stage = select_one(lineage.stages.planned.values(), request.stage)
        steps.make_on_ranks(lineage, lineage.stages[stage.name], rank)
    except UserError:
        if rank:
            # The launcher ends this rank with rank 0; were this one first, rank 0 would end before it has said
            # anything. A fault of this rank alone is said after all.
            time.sleep(GRACE)
        raise


if __name__ == "__main__":
    main()
