"""Progress of long work: one bar in a terminal, a plain line from time to time in a log file.

All of it goes to stderr, beside what commands print.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import ClassVar

from tqdm import tqdm

from smolpost import stage_log

LINES = 30  # seconds between two lines of a log file, at least
LATER = "SMOLPOST_SECONDS_LATER"  # in the environment of a training: what its run needs after it; "": not known
REDRAW = 0.1  # seconds between two looks of a bar
BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


def duration(seconds: float) -> str:
    """A duration with the precision of an estimate: 42 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def seconds_later() -> float | None:
    """Seconds that the run around this process needs after it, as the run estimates them; None: not known."""
    text = os.environ.get(LATER)
    return float(text) if text else None


class Progress:
    """Work of a known number of units, as a context.

    What is opened while another one is open is a part of the unit that the other one has at work: it moves that one
    and has no bar of its own, so a user sees one bar, whatever calls what.

    Args:
        what: The work, in a few words.
        unit: Singular.
        done: Units that an earlier run has done: the bar starts there, and they are no basis for an estimate.
        shown: False on ranks that leave it to another one.
        aside: What gets a unit ready, and is quick beside it: moves no outer bar and has no line at its end.
        lines: False where the work prints lines of its own: a log file then gets only the one at the end.
    """

    _open: ClassVar[list["Progress"]] = []  # from the outermost to the innermost

    def __init__(
        self, what: str, total: int, unit: str, *, done: int = 0, shown: bool = True, aside: bool = False,
        lines: bool = True,
    ):  # fmt: skip
        self.what, self.total, self.unit, self.aside, self.lines = what, total, unit, aside, lines
        self.done = self.found = done
        self.part = 0.0  # of the unit at work, by what is open inside
        self._outer = self._open[-1] if self._open else None
        view = Hidden if self._outer or not shown else Terminal if sys.stderr.isatty() else Lines
        self._view = view(self)

    def __enter__(self) -> "Progress":
        self._open.append(self)
        self._moved()
        return self

    def __exit__(self, error, *_) -> None:
        self._open.remove(self)
        self._view.close(finished=error is None)

    def update(self, number: int = 1) -> None:
        """Count more units as done."""
        self.done += number
        self.part = 0.0
        self._moved()

    def find(self, number: int = 1) -> None:
        """Count units that an earlier run has done."""
        self.found += number
        self.update(number)

    @property
    def fraction(self) -> float:
        """In [0, 1]."""
        return min(1.0, (self.done + self.part) / self.total) if self.total else 1.0

    def left(self, elapsed: float) -> float | None:
        """Seconds to go, from the time that this run's units took; None where there is no basis."""
        fresh = self.done + self.part - self.found
        return elapsed * (self.total - self.done - self.part) / fresh if fresh > 0 and elapsed > 0 else None

    def __str__(self) -> str:
        inside = self._open[self._open.index(self) + 1 :] if self in self._open else []
        at_work = f" ({inside[-1].what})" if inside else ""
        return f"{self.what}, {self.done:,} of {self.total:,} {plural(self.unit, self.total)}{at_work}"

    def _moved(self) -> None:
        if self._outer and not self.aside:
            self._outer.part = max(self._outer.part, self.fraction)
        if self._outer:
            self._outer._moved()
        self._view.show()


def plural(unit: str, number: int) -> str:
    return unit if number == 1 else f"{unit}s"


class Hidden:
    def __init__(self, progress: Progress):
        pass

    def show(self) -> None:
        pass

    def close(self, *, finished: bool) -> None:
        pass


class Terminal:
    """tqdm's bar, with lines in the log of the stage."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.lines = Lines(progress, stage_log.line)
        # Averages over all of this run: evaluations begin with their longest prompts, and workers report in bursts.
        self.bar = tqdm(
            desc=str(progress), total=progress.total, initial=progress.done, bar_format=BAR, smoothing=0,
            dynamic_ncols=True, disable=False,
        )  # fmt: skip
        self.last = time.monotonic()

    def show(self) -> None:
        self.lines.show()
        now = time.monotonic()
        if now - self.last >= REDRAW:
            self.last = now
            self._draw()

    def close(self, *, finished: bool) -> None:
        self._draw()
        self.bar.close()
        self.lines.close(finished=finished)

    def _draw(self) -> None:
        self.bar.n = min(self.progress.done + self.progress.part, self.progress.total)
        self.bar.initial = self.progress.found
        self.bar.set_description_str(str(self.progress))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Lines:
    """Lines for a log file: at most one every LINES seconds, and one at the end."""

    def __init__(self, progress: Progress, say: Callable[[str], None] = _say):
        self.progress, self.say = progress, say
        self.began = self.last = time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        if not self.progress.lines or now - self.last < LINES or self.progress.fraction == 1:
            return
        self.last = now
        left = self.progress.left(now - self.began)
        about = "" if left is None else f", about {duration(left)} left"
        self.say(f"{self.progress}, {self.progress.fraction:.0%}{about}")

    def close(self, *, finished: bool) -> None:
        if finished and self.progress.done > self.progress.found and not self.progress.aside:
            made = self.progress.done
            found = f" ({self.progress.found:,} were there)" if self.progress.found else ""
            self.say(
                f"{self.progress.what}: {made:,} {plural(self.progress.unit, made)} in "
                f"{duration(time.monotonic() - self.began)}{found}"
            )
