"""Start the commands of a plan: as forks of this process where it can be forked, as programs of their own elsewhere.

A command's imports take 5 to 8 seconds of one core. A fork finds them done: this process imports what commands need,
once, before it starts the first one. It runs no computation itself, so a fork begins as a new program does after its
imports, and gives the same bytes.
"""

import atexit
import functools
import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from smolpost import signals

MODULES = {"smolpost": "smolpost.cli", "accelerate": "smolpost.launch"}  # whatever PATH holds for these words
ENVIRONMENT = {  # of the commands, unless the user has set them
    "PYTHONUNBUFFERED": "1",
    # Threads that wait for each other spin this long before they sleep. libgomp's own 300,000 turns make a miniature's
    # step several times slower as soon as anything else runs on the machine; sleeping at once costs half the speed.
    "GOMP_SPINCOUNT": "10000",
    signals.UNDER_RUN: "1",
}
IMPORTS = (  # what commands would import for seconds
    "smolpost.data.prepare_documents",
    "smolpost.data.prepare_pairs",
    "smolpost.training.train",
    "smolpost.evaluation.run",
    "smolpost.merging.linear",
    "smolpost.synthesis.local",
    "smolpost.report.pareto",
    "torch.utils.tensorboard",
)


class Process(Protocol):
    def wait(self) -> int:
        """The exit code, negative for a signal that killed it."""


def start(command: tuple[str, ...], variables: Mapping[str, str] = MappingProxyType({})) -> Process:
    """Start a command as a plan prints it; ctrl-C never reaches it, as this process passes that on.

    A command begins with `python FILE`, `smolpost VERB` or `accelerate launch`.

    Args:
        variables: What its environment has beside this process's own.
    """
    environment = ENVIRONMENT | os.environ | variables
    forked = warm()
    with signals.no_ctrl_c():
        return Fork(command, environment) if forked else subprocess.Popen(arguments(command), env=environment)


def arguments(command: tuple[str, ...]) -> list[str]:
    """The command for the operating system: this interpreter and our modules instead of what PATH holds."""
    program, *words = command
    return [sys.executable, *(["-m", MODULES[program]] if program in MODULES else []), *words]


@functools.cache
def warm() -> bool:
    """Import what commands need; whether a fork of this process is as good as a new program.

    It is not if this process may have computed before, because OpenMP's threads and CUDA's state do not survive a
    fork; nor if it has threads, because a fork would find their locks closed; nor on systems other than Linux, whose
    libraries do not allow it. Then nothing is imported.
    """
    if sys.platform != "linux" or "torch" in sys.modules or threading.active_count() > 1:
        return False
    before = dict(os.environ)
    os.environ.setdefault("GOMP_SPINCOUNT", ENVIRONMENT["GOMP_SPINCOUNT"])  # libgomp reads it when it is loaded
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # libraries that look for GPUs do not start CUDA
    for name in IMPORTS:
        importlib.import_module(name)
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK")
    os.environ.update(before)
    gc.freeze()  # collections of garbage in a fork leave alone what it shares with this process
    return threading.active_count() == 1


class Fork:
    """A command in a fork of this process."""

    def __init__(self, command: tuple[str, ...], environment: Mapping[str, str]):
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal that came to the fork before it has handlers of its own would run this process's.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.ENDING)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _become(command, environment, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _become(command: tuple[str, ...], environment: Mapping[str, str], mask: set[signal.Signals]) -> None:
    """Do in this fork what the program would do, and end as it would."""
    code = 1
    try:
        for number in signals.ENDING:
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ.update(environment)
        # Streams like those of a program: by the file numbers, as sys.stdout may be another one here, and unbuffered.
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        _main(command)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
        finally:
            os._exit(code)


def _main(command: tuple[str, ...]) -> None:
    program, *words = command
    if program in MODULES:
        module = importlib.import_module(MODULES[program])
        sys.argv, sys.path[0] = [module.__file__, *words], os.getcwd()
        module.main()
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")
