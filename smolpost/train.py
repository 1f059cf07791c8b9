"""What `accelerate launch -m smolpost.train pipeline=... stage=...` runs, once per rank."""

import os
import sys
import time

from smolpost import recipe
from smolpost.cli import one_line_errors
from smolpost.errors import UserError
from smolpost.pipeline import steps
from smolpost.pipeline.lineage import Lineage
from smolpost.pipeline.plan import select_one

GRACE = 30  # seconds


def main() -> None:
    with one_line_errors():
        try:
            lineage = Lineage(request := recipe.load(sys.argv[1:]))
            stage = select_one([s.plan for s in lineage.stages.values()], request.stage)
            steps.train(lineage, lineage.stages[stage.name])
        except UserError:
            if int(os.environ.get("RANK", 0)):
                # Rank 0 says it for all. The launcher ends this rank with rank 0; were this one first, rank 0 would end
                # before it has said anything. A fault of this rank alone is said after all.
                time.sleep(GRACE)
            raise
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Not through Python's own end: a gloo thread that still frees its last tensors would meet it and abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
