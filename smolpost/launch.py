"""`accelerate launch` as `smolpost run` calls it: where a rank says in one line what is wrong, that is all.

By themselves accelerate and torch end with exit code 1, and with a traceback of their own code, whatever a rank said.
"""

import logging
import subprocess
import sys

from smolpost import third_party

REFUSED = 2  # exit code of a rank that has said in one line what is wrong


def main() -> None:
    third_party.silence()
    from accelerate.commands.accelerate_cli import main as accelerate
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "--quiet" in sys.argv:  # with it the exit code is lost; what it silences is silenced below
        sys.argv.remove("--quiet")
    # Says that ranks end, which the error says again with more.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").disabled = True
    try:
        accelerate()
    except subprocess.CalledProcessError as error:  # one process, or DeepSpeed on several nodes
        sys.exit(REFUSED if error.returncode == REFUSED else 1)
    except ChildFailedError as error:
        if REFUSED in (failure.exitcode for failure in error.failures.values()):
            sys.exit(REFUSED)
        raise


if __name__ == "__main__":
    main()
