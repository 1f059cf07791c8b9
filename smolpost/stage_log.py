"""What the commands of a stage print, kept in a file, and where they are, in a second one for `smolpost status`.

    logs/STAGE-KEY.log    their lines, with a dated one at the start and the end of each command
    logs/STAGE-KEY.json   the last command: when it began, its last logged step, how it ended

The terminal gets the same as without. Bars stay out of the file. All ranks write into it, those after the first with
their number before each line. Every process that writes holds a shared lock on the log, which the kernel frees when
the process dies: a log that is locked has a command at work.
"""

import contextlib
import fcntl
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from smolpost.files import read_json, write_json

FOLDER = "logs"  # in the pipeline's folder
STEPS = 1.0  # seconds between two steps that the second file takes, at least
SAID = "smolpost: "  # begins the line that says what is wrong
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and moves of a terminal

_hidden: dict[str, str] = {}  # text -> what the file has in its place
_commands: list["StageLog | None"] = []  # the command at work in this process, with its log where it has one


def hide(texts: dict[str, str]) -> None:
    """From now on, these texts are written as others."""
    _hidden.update(texts)


@contextlib.contextmanager
def command() -> Iterator[None]:
    """A command of the command line, from its start to its exit code: `begin` in it opens a log that ends with it."""
    _commands.append(None)
    code, error = 0, None
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException as fault:
        code, error = 1, fault
        raise
    finally:
        if log := _commands.pop():
            log.end(code, error)


def begin(file: Path, what: str) -> None:
    """Keep what this process prints from here to the end of its command.

    Nothing is kept where the disk cannot be written, outside of a command, and where the command has a log already.

    Args:
        file: The log; its folder need not be there.
        what: The command: "prepare", "train", "eval" and the like.
    """
    if _commands and _commands[-1] is None:
        with contextlib.suppress(OSError):
            _commands[-1] = StageLog(file, what)


def line(text: str) -> None:
    """Write a line into this command's log alone, where the terminal shows a bar instead."""
    if _commands and (log := _commands[-1]):
        log.write(text)


def screen(stream: TextIO) -> TextIO:
    """The stream without the log behind it, for what draws itself."""
    return stream._stream if isinstance(stream, Kept) else stream


def note_step(**fields: object) -> None:
    """Let the second file of this command's log say where a training is: the step and what was logged there."""
    if _commands and (log := _commands[-1]):
        log.note_step(fields)


@contextlib.contextmanager
def held(file: Path) -> Iterator[None]:
    """Lock the log between the commands of its stage, too."""
    lock = None
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = _open(file)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def is_held(file: Path) -> bool:
    """Whether a command of the log's stage is at work, or a run between two of them."""
    try:
        # NFS locks exclusively what is open for writing.
        opened = os.open(file, os.O_RDWR if os.access(file, os.W_OK) else os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(opened)
    return False


def state(file: Path) -> dict:
    """What the log's second file says; {} where it is not there.

    Keys: command, began and ended (UTC), process, host, exit_code, said (one line: what was wrong), and of a training
    step, steps, loss, tokens_per_second, seconds_left, logged.
    """
    return read_json(file.with_suffix(".json"))


def note(file: Path, **fields: object) -> None:
    """Change some of the second file's fields."""
    with contextlib.suppress(OSError):
        write_json(file.with_suffix(".json"), state(file) | fields)


def now() -> str:
    """UTC, as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _open(file: Path) -> int:
    opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(opened, fcntl.LOCK_SH)
    return opened


class StageLog:
    """The open log of this process."""

    def __init__(self, file: Path, what: str):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.rank = file, int(os.environ.get("RANK", 0))
        self._opened = _open(file)
        self._said, self._noted = "", 0.0
        if self.rank == 0:
            host, process = socket.gethostname(), os.getpid()
            state = {"command": what, "began": now(), "process": process, "host": host}
            write_json(file.with_suffix(".json"), state)
            self.write(f"--- {state['began']} {what} begins (process {process} on {host})")
        self._before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = Kept(sys.stdout, self), Kept(sys.stderr, self)
        _move_handlers()

    def write(self, line: str) -> None:
        """Append a line, in one piece."""
        line = _masked(line)
        if line.startswith(SAID):
            self._said = line.removeprefix(SAID)
        mark = f"[rank {self.rank}] " if self.rank else ""
        with contextlib.suppress(OSError):  # a full disk; whoever writes results there says so
            os.write(self._opened, f"{mark}{line}\n".encode(errors="replace"))

    def note_step(self, fields: dict[str, object]) -> None:
        if time.monotonic() - self._noted >= STEPS or fields["step"] == fields["steps"]:
            self._noted = time.monotonic()
            note(self.file, **fields, logged=now())

    def end(self, code: int, error: BaseException | None) -> None:
        """
        Args:
            code: The exit code.
            error: What Python is about to show as a traceback.
        """
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Kept):
                stream.end()
        sys.stdout, sys.stderr = self._before
        _move_handlers()
        if error:
            for line in "".join(traceback.format_exception(error)).splitlines():
                self.write(line)
            self._said = _masked(" ".join(f"{type(error).__name__}: {error}".split()))
        if self.rank == 0:
            note(self.file, ended=now(), exit_code=code, **({"said": self._said} if self._said else {}))
            self.write(f"--- {now()} ends with exit code {code}")
        elif self._said:
            note(self.file, said=self._said)
        os.close(self._opened)


def _masked(line: str) -> str:
    for text, name in _hidden.items():
        line = line.replace(text, name)
    return line


class Kept:
    """A stream whose complete lines go into the log, too."""

    def __init__(self, stream: TextIO, log: StageLog):
        self._stream, self._log = stream, log
        self._line, self._on_bar = "", False

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        self._keep(CONTROL.sub("", text))
        return written

    def _keep(self, text: str) -> None:
        if text.startswith("\r"):  # a bar draws itself
            self._on_bar, text = True, ""
        elif self._on_bar and text:
            self._on_bar, text = False, text.removeprefix("\n")
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._log.write(line.rpartition("\r")[2])

    def end(self) -> None:
        if self._line:
            self._log.write(self._line)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _move_handlers() -> None:
    """Let the libraries' loggers write to the streams as they are now; they keep those of their import."""
    loggers = [logging.root, *(log for log in logging.root.manager.loggerDict.values() if hasattr(log, "handlers"))]
    for handler in {handler for log in loggers for handler in log.handlers}:
        if type(handler) is logging.StreamHandler:
            for number, stream in ((1, sys.stdout), (2, sys.stderr)):
                if _number(handler.stream) == number:
                    handler.setStream(stream)


def _number(stream: object) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):  # not of the operating system, or closed
        return None
