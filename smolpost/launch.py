"""`accelerate launch` as `smolpost run` calls it: where a rank says in one line what is wrong, that is all.

By themselves accelerate and torch end with exit code 1, and with a traceback of their own code, whatever a rank said.
A signal for this process goes on to the ranks, which save and end: accelerate would leave a single one to itself, and
torch would kill several after 30 seconds.
"""

import logging
import os
import subprocess
import sys

from smolpost import signals, third_party
from smolpost.cli import one_line_errors

REFUSED = 2  # exit code of a rank that has said in one line what is wrong


def main() -> None:
    asked, code = signals.PassedOn(), 1
    with one_line_errors():
        try:
            with asked:  # before the imports, which take seconds
                code = launch()
        except BaseException:
            if not asked.signum:  # what comes after a signal comes of it
                raise
    sys.exit(signals.exit_code(asked.signum) if asked.signum else code)


def launch() -> int:
    """Run the command line as accelerate does; the exit code.

    Raises:
        ChildFailedError: One of several ranks failed and has not said in one line why.
    """
    third_party.silence()
    from accelerate.commands.accelerate_cli import main as accelerate
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "--quiet" in sys.argv:  # with it the exit code is lost; what it silences is silenced below
        sys.argv.remove("--quiet")
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torch's launcher takes this one alone: the others are ours
    # Says that ranks end, which the error says again with more.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").disabled = True
    try:
        accelerate()
    except subprocess.CalledProcessError as error:  # one process, or DeepSpeed on several nodes
        return error.returncode if _has_spoken(error.returncode) else 1
    except ChildFailedError as error:
        spoken = [failure.exitcode for failure in error.failures.values() if _has_spoken(failure.exitcode)]
        if not spoken:
            raise
        return spoken[0]
    return 0


def _has_spoken(code: int) -> bool:
    return code == REFUSED or signals.is_stop(code)


if __name__ == "__main__":
    main()
