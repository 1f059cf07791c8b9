"""The lines that a training shows: one for each entry of its log, in fixed columns of at most 80 characters."""

import math
from collections.abc import Callable
from typing import NamedTuple

WIDTH = 80  # characters of a line, as long as no number needs more
EVERY = 20  # lines between two heads
UNKNOWN, NOT_LOGGED = "?", "-"


def _loss(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.1e}"


def _rate(value: float) -> str:
    return f"{value:.2e}" if value else "0"


def _number(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 1e-2 <= abs(value) < 1e2 else f"{value:.1e}"


def _gigabytes(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else str(value)


def _percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else str(value)


def clock(seconds: float | None) -> str:
    """A duration in at most 6 characters: 42s, 12m, 3h20m, 12h05m, 3d04h; "?" where it is not known."""
    if seconds is None:
        return UNKNOWN
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


class Column(NamedTuple):
    """
    Attributes:
        key: In an entry of the log.
        head: In two lines, the unit last.
        width: Characters.
        text: Of a value.
    """

    key: str
    head: tuple[str, str]
    width: int
    text: Callable[[float], str]


FIRST = (
    Column("loss", ("", "loss"), 8, _loss),  # nats
    Column("learning_rate", ("learning", "rate"), 8, _rate),
    Column("grad_norm", ("grad", "norm"), 7, _number),
)
# Of single methods, under TRL's names. Those that a log has are shown as far as the line has room, in this order.
METHODS = (
    Column("rewards/margins", ("", "margin"), 8, _number),
    Column("rewards/accuracies", ("pair", "acc"), 4, _percent),
    Column("kl", ("", "KL"), 7, _number),
    Column("reward", ("", "reward"), 7, _number),
    Column("completions/mean_length", ("reply", "tokens"), 6, _whole),
    Column("samples/mean_length", ("reply", "tokens"), 6, _whole),
    Column("on_policy", ("on", "policy"), 6, _percent),
    Column("mean_token_accuracy", ("token", "acc"), 5, _percent),
)
LAST = (
    Column("tokens_per_second", ("tokens", "per s"), 9, _whole),
    Column("peak_gb", ("peak", "GB"), 5, _gigabytes),
)
STAGE_LEFT = Column("stage_left", ("stage", "left"), 6, clock)
RUN_LEFT = Column("run_left", ("run", "left"), 6, clock)


class Table:
    """Log entries as lines. The head comes again every 20 lines, and when an entry brings a column.

    Args:
        total: Optimizer steps of the stage.
        under_run: Other stages may follow, so there is a column for the time until the last one ends.
    """

    def __init__(self, total: int, *, under_run: bool):
        self.total = total
        self.ends = (STAGE_LEFT, RUN_LEFT) if under_run else (STAGE_LEFT,)
        self._keys: set[str] = set()  # of METHODS, in the entries so far
        self._columns: list[Column] = []
        self._lines = 0  # since the last head

    def lines(self, step: int, entry: dict[str, float], stage_left: float | None, later: float | None) -> list[str]:
        """The line of an entry, after a head where one is due.

        Args:
            stage_left: Seconds until the last step; None: not known.
            later: Seconds that the run needs after this stage; None: not known.
        """
        self._keys |= {column.key for column in METHODS if column.key in entry}
        columns = self._chosen()
        due = columns != self._columns or self._lines == EVERY
        self._columns, self._lines = columns, 1 if due else self._lines + 1
        run_left = None if stage_left is None or later is None else stage_left + later
        values = entry | {"stage_left": stage_left, "run_left": run_left}
        cells = [column.text(values[column.key]) if column.key in values else NOT_LOGGED for column in columns]
        return [*(self._head() if due else ()), self._line(f"{step}/{self.total}", cells)]

    def _chosen(self) -> list[Column]:
        around = (*FIRST, *LAST, *self.ends)
        room, chosen = WIDTH - self._step_width - sum(1 + column.width for column in around), []
        for column in METHODS:
            if column.key in self._keys and column.width < room:
                chosen.append(column)
                room -= 1 + column.width
        return [*FIRST, *chosen, *LAST, *self.ends]

    @property
    def _step_width(self) -> int:
        return max(len("step"), 2 * len(str(self.total)) + 1)

    def _head(self) -> list[str]:
        return [self._line(step, [c.head[row] for c in self._columns]) for row, step in enumerate(("", "step"))]

    def _line(self, step: str, cells: list[str]) -> str:
        widths = [self._step_width, *(column.width for column in self._columns)]
        return " ".join(cell.rjust(width) for cell, width in zip([step, *cells], widths, strict=True))
