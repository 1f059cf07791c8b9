"""SIGINT, SIGTERM and SIGHUP: a process ends at once, or after its current step, or passes the signal on."""

import contextlib
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import psutil

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Schedulers signal every process of a job, and parents pass the signal on: one wish reaches a process several times.
COPIES = 2.0  # seconds after the first in which another signal is the same wish
UNDER_RUN = "SMOLPOST_UNDER_RUN"  # set in the environment of what `smolpost run` starts: it says itself what stopped


class Stopped(KeyboardInterrupt):
    """A signal ends this process.

    Args:
        where: What is added to the line that says so, such as " at step 7".
    """

    def __init__(self, signum: int, where: str = ""):
        super().__init__(signum)
        self.signum, self.where = signum, where


def exit_code(signum: int) -> int:
    """The exit code that shells show for a process that the signal ended: 130 ctrl-C, 143 SIGTERM, 129 SIGHUP."""
    return 128 + signum


def stopped_line(code: int, where: str = "") -> str:
    """The line that says why the process ended with `exit_code`."""
    return f"smolpost: stopped by {name(code)}{where}; the same command continues here"


def name(code: int) -> str:
    """The signal that an exit code of `exit_code` stands for, as people call it."""
    number = signal.Signals(code - 128)
    return "ctrl-C" if number == signal.SIGINT else number.name


def is_stop(code: int) -> bool:
    """Whether a process ended with the code of one of the signals."""
    return code - 128 in ENDING


def stop(signum: int, frame: FrameType | None = None) -> None:
    """The handler for work that can be continued from its finished parts."""
    leave_closed_terminal()
    raise Stopped(signum)


def leave_closed_terminal() -> None:
    """Stop printing if the terminal is gone: failing prints would end the work before it is saved."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give the signals to the handler while the block runs.

    A signal that this process was started to ignore, as under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers to the main thread alone
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def no_ctrl_c() -> Iterator[None]:
    """A process started in this block never gets ctrl-C from the terminal; this process passes it on.

    Blocked rather than ignored: one that comes to this process in the meantime is not lost.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Kept(contextlib.ExitStack):
    """Keeps the first signal while the block runs; another one, later than copies of the first, ends at once.

    Attributes:
        signum: The signal that came first, or None.
    """

    signum: int | None = None

    def __enter__(self) -> "Kept":
        self.enter_context(handled_by(self._take))
        return super().__enter__()

    def _take(self, signum: int, frame: FrameType | None) -> None:
        leave_closed_terminal()
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
            self.first()
        elif time.monotonic() - self._since > COPIES:
            self.again()

    def first(self) -> None:
        """Called once, at the first signal."""

    def again(self) -> None:
        raise Stopped(self.signum)


class PassedOn(Kept):
    """Passes the first signal on to the children, which end in their own time; a second one kills them and theirs.

    The children get SIGTERM for each of the signals: it ends a process silently that has no handler for it yet.
    """

    def first(self) -> None:
        children = psutil.Process().children()
        if not children:
            raise Stopped(self.signum)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()

    def again(self) -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def default_in_fork() -> None:
    """In a forked worker: end at the signals that its parent handles, except ctrl-C, after which the parent ends it."""
    for number in ENDING:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
