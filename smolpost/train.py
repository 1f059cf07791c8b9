"""What `accelerate launch -m smolpost.train pipeline=... stage=...` runs, once per rank."""

import os
import sys

from smolpost import recipe
from smolpost.cli import one_line_errors
from smolpost.errors import UserError
from smolpost.pipeline import steps
from smolpost.pipeline.lineage import Lineage
from smolpost.pipeline.plan import select_one


def main() -> None:
    with one_line_errors():
        try:
            lineage = Lineage(request := recipe.load(sys.argv[1:]))
            stage = select_one([s.plan for s in lineage.stages.values()], request.stage)
            steps.train(lineage, lineage.stages[stage.name])
        except UserError:
            if int(os.environ.get("RANK", 0)):  # rank 0 says it for all
                sys.exit(2)
            raise
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Not through Python's own end: a gloo thread that still frees its last tensors would meet it and abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
