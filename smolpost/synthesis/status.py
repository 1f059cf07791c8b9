"""How a run goes on: a table in a terminal, a plain line from time to time in a log file, and a file for programs.

Finished prompts are only counted when they come in. A thread shows the counts, also while no prompt finishes: a reply
of 32k tokens takes half an hour.
"""

import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.live import Live

from smolpost import progress, stage_log
from smolpost.files import write_json
from smolpost.progress import duration
from smolpost.screen import Blocks

if TYPE_CHECKING:  # it imports datatrove
    from smolpost.synthesis.run import Event, RunCounts

TICK = 1.0  # seconds between two looks at the counts
SAVE = 5.0  # seconds between two states of the file
WINDOW = 60.0  # seconds over which speeds are measured

Load = Callable[[], tuple[int, int]]  # -> requests under way, and how many may be


class Prices(NamedTuple):
    """Per million tokens; None where none is set."""

    input: float | None = None
    output: float | None = None

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """In the currency of the prices; None where one of them is not set."""
        if self.input is None or self.output is None:
            return None
        return (self.input * prompt_tokens + self.output * completion_tokens) / 1e6


NO_PRICES = Prices()


class RunStatus:
    """The `watch` of a run, as a context around it.

    The file says "running", "finished" or "stopped". A killed process leaves "running" with an old `updated`.

        with RunStatus("stages.traces: teacher", folder / "status.json", total) as watch:
            generate(..., watch=watch)

    Args:
        what: The run, in a few words.
        file: Rewritten atomically every few seconds, when the run ends and when it fails.
        total: Prompts of the run.
        load: Of the engine; None: not shown.
    """

    def __init__(self, what: str, file: Path, total: int, *, prices: Prices = NO_PRICES, load: Load | None = None):
        self.what, self.file, self.total, self.prices, self.load = what, file, total, prices, load
        self._counts: RunCounts | None = None
        self._found = 0  # prompts that were finished before
        self._replies = self._cut = self._tokens = self._prompts = 0  # of this process
        self._state, self._error = "running", None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="run status", daemon=True)

    def __call__(self, event: "Event") -> None:
        for sample in event.record.samples:
            for reply in sample.replies:
                self._replies += 1
                self._cut += reply.finish_reason == "length"
                self._tokens += reply.completion_tokens or 0
        self._prompts += 1
        self._counts, self._found = event.counts, event.found.done + event.found.failed

    def conclude(self, counts: "RunCounts") -> None:
        """Take the counts of the whole run at its end, as it may have had nothing to ask."""
        self._counts = counts

    def __enter__(self) -> "RunStatus":
        self._began = self._saved = self._told = time.monotonic()
        self._started = _now()
        self._past = deque([(self._began, 0, 0)])  # (time, replies, tokens), the oldest at the start of the window
        self._live = None
        if sys.stderr.isatty():
            screen = stage_log.screen(sys.stderr)
            console = Console(file=screen, markup=False, emoji=False, highlight=False)
            self._live = Live(get_renderable=self._table, console=console, auto_refresh=False)
            self._live.start()
        write_json(self.file, self.snapshot())
        self._thread.start()
        return self

    def __exit__(self, kind, error, _) -> None:
        self._ended.set()
        self._thread.join()
        self._state = "finished" if kind is None else "stopped"
        self._error = kind and " ".join(f"{kind.__name__}: {error}".split())
        if self._live:
            self._live.refresh()
            self._live.stop()
        if self._prompts or kind:
            self._print()
        write_json(self.file, self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """What the file holds. Times are in seconds, speeds those of the last minute, tokens those of all replies."""
        now = time.monotonic()
        counts = self._counts
        done, failed = (counts.done, counts.failed) if counts else (0, 0)
        tokens = (counts.prompt_tokens, counts.completion_tokens) if counts else (0, 0)
        began, replies, generated = self._past[0]
        seconds, left = max(1e-9, now - began), self.total - done - failed
        under_way, limit = self.load() if self.load else (None, None)
        return {
            "state": self._state,
            "what": self.what,
            "error": self._error,
            "prompts": self.total,
            "done": done,
            "failed": failed,
            "found": self._found,
            "in_flight": under_way,
            "limit": limit,
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
            "requests_per_second": round((self._replies - replies) / seconds, 2),
            "tokens_per_second": round((self._tokens - generated) / seconds, 1),
            "cut_share": self._cut / self._replies if self._replies else None,
            "cost": self.prices.cost(*tokens),
            "seconds": round(now - self._began, 1),
            "seconds_left": round((now - self._began) * left / self._prompts, 1) if self._prompts else None,
            "started": self._started,
            "updated": _now(),
            "host": socket.gethostname(),
            "process": os.getpid(),
        }

    # ------------------------------------------------------------ shown

    def _look(self) -> None:
        while not self._ended.wait(TICK):
            now = time.monotonic()
            self._past.append((now, self._replies, self._tokens))
            while now - self._past[0][0] > WINDOW:
                self._past.popleft()
            if self._live:
                self._live.refresh()
            if now - self._told >= progress.LINES:
                self._told = now
                self._print()
            if now - self._saved >= SAVE:
                self._saved = now
                write_json(self.file, self.snapshot())

    def _table(self) -> Blocks:
        cells = _cells(self.snapshot())
        return Blocks(["", *cells], [["", *cells.values()]], title=self.what)

    def _print(self) -> None:
        cells = _cells(self.snapshot())
        line = f"{self.what}: {', '.join(f'{name} {cell}' for name, cell in cells.items())}"
        if self._live:
            stage_log.line(line)
        else:
            print(line, file=sys.stderr, flush=True)


def _cells(found: dict[str, Any]) -> dict[str, str]:
    """Head -> text, of what is known."""
    share = (found["done"] + found["failed"]) / max(1, found["prompts"])
    cells = {
        "prompts": f"{found['done'] + found['failed']:,} of {found['prompts']:,} ({share:.0%})",
        "failed": f"{found['failed']:,}",
    }
    if found["found"]:
        cells["were there"] = f"{found['found']:,}"
    if found["in_flight"] is not None and found["state"] == "running":
        cells["in flight"] = f"{found['in_flight']:,}/{found['limit']:,}"
    cells |= {"requests/s": f"{found['requests_per_second']:,.1f}", "tokens/s": f"{found['tokens_per_second']:,.0f}"}
    if found["cut_share"] is not None:
        cells["cut"] = f"{found['cut_share']:.1%}"
    if found["cost"] is not None:
        cells["cost"] = f"{found['cost']:,.2f}"
    if found["state"] != "running":
        return cells | {found["state"]: f"after {duration(found['seconds'])}"}
    return cells | {"left": "?" if found["seconds_left"] is None else f"about {duration(found['seconds_left'])}"}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
