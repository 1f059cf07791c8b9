"""`accelerate launch` as `smolpost run` calls it: where a rank says in one line what is wrong, that is all.

By themselves accelerate and torch end with exit code 1, and with a traceback of their own code, whatever a rank said.
A signal for this process goes on to the ranks, which save and end: accelerate would leave a single one to itself, and
torch would kill several after 30 seconds. A rank that is alone is this process: accelerate would start one more, which
imports everything a second time.
"""

import argparse
import logging
import os
import subprocess
import sys

from smolpost import signals, third_party, train
from smolpost.cli import one_line_errors

REFUSED = 2  # exit code of a rank that has said in one line what is wrong
PROGRAM = ["-m", "smolpost.train"]


def main() -> None:
    asked, code = signals.PassedOn(), 1
    with one_line_errors():
        try:
            with asked:  # before the imports, which take seconds
                code = launch()
        except BaseException:
            if not asked.signum:  # what comes after a signal comes of it
                raise
    if code is None:
        train.main()
    sys.exit(signals.exit_code(asked.signum) if asked.signum else code)


def launch() -> int | None:
    """Run the command line as accelerate does; the exit code, or None where this process has become the only rank.

    Raises:
        ChildFailedError: One of several ranks failed and has not said in one line why.
    """
    third_party.silence()
    from accelerate.commands import accelerate_cli
    from accelerate.commands import launch as launchers
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "--quiet" in sys.argv:  # with it the exit code is lost; what it silences is silenced below
        sys.argv.remove("--quiet")
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torch's launcher takes this one alone: the others are ours
    # Says that ranks end, which the error says again with more.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").disabled = True
    start, alone = launchers.simple_launcher, False

    def start_one(args: argparse.Namespace) -> None:
        nonlocal alone
        alone = _become_rank(args)
        if not alone:
            start(args)

    launchers.simple_launcher = start_one
    try:
        accelerate_cli.main()
    except subprocess.CalledProcessError as error:  # one process, or DeepSpeed on several nodes
        return error.returncode if _has_spoken(error.returncode) else 1
    except ChildFailedError as error:
        spoken = [failure.exitcode for failure in error.failures.values() if _has_spoken(failure.exitcode)]
        if not spoken:
            raise
        return spoken[0]
    return None if alone else 0


def _become_rank(args: argparse.Namespace) -> bool:
    """Give this process what accelerate would give the process of its only rank; False where that is not ours.

    Args:
        args: Of `accelerate launch`, with what its config file says.
    """
    import torch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(args)
    if command[:3] != [sys.executable, *PROGRAM]:
        return False
    os.environ.update(environment)
    sys.argv = command[2:]
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # is read when torch is imported
    return True


def _has_spoken(code: int) -> bool:
    return code == REFUSED or signals.is_stop(code)


if __name__ == "__main__":
    main()
