"""Answers checked in processes of their own, as mathematics may hang, run out of memory or need the main thread.

A long integer power keeps Python from handling alarms, so only the end of its process stops it. Each worker is
a program of its own that reads pairs and writes verdicts, a line of JSON each. The kernel ends it when one pair takes
too much computing time. Waiting for a busy machine does not count, so its load does not change verdicts.
"""

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence

from smolpost.synthesis.filters.answers import UNDECIDED, quick_verdict
from smolpost.synthesis.records import Verdict

CPU_SECONDS = 10.0  # for one pair
MEMORY = 4 << 30  # bytes of address space
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each thread reserves some of the MEMORY
MOST_PAIRS = 2000  # of one process: sympy keeps what it has seen

Pair = tuple[str, str]  # reference, answer


class AnswerWorkers:
    """Worker processes, started when they are first needed. For one thread at a time.

    Args:
        workers: How many at most.
        seconds: Of computing time for one pair; "undecided" is its verdict where that is not enough.
    """

    def __init__(self, workers: int = 1, seconds: float = CPU_SECONDS):
        self.workers, self.seconds = workers, seconds
        self.idle: list[_Worker] = []

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """`right_answer` of each pair, in their order.

        A pair whose worker is killed from outside gets a second try.

        Raises:
            RuntimeError: A worker cannot start.
        """
        found = [quick_verdict(*pair) for pair in pairs]
        waiting = deque((i, True) for i, verdict in enumerate(found) if verdict is None)
        with selectors.DefaultSelector() as selector, _ended_after_errors() as busy:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    i, is_first = waiting.popleft()
                    worker = self.idle.pop() if self.idle else _Worker(self.seconds)
                    busy.append(worker)
                    worker.ask(pairs[i])
                    selector.register(worker.process.stdout, selectors.EVENT_READ, (worker, i, is_first))
                for key, _ in selector.select():
                    worker, i, is_first = key.data
                    selector.unregister(worker.process.stdout)
                    found[i] = worker.verdict()
                    busy.remove(worker)
                    if worker.ended():
                        if found[i] is None and is_first and not worker.ran_out():
                            waiting.append((i, False))
                    else:
                        self.idle.append(worker)
        return [verdict or UNDECIDED for verdict in found]

    def close(self) -> None:
        while self.idle:
            self.idle.pop().end()

    def __enter__(self) -> "AnswerWorkers":
        return self

    def __exit__(self, *error) -> None:
        self.close()


@contextlib.contextmanager
def _ended_after_errors() -> Iterator[list["_Worker"]]:
    """A list of workers; those that are in it after an error or Ctrl-C end, as their verdicts would be read later."""
    workers: list[_Worker] = []
    try:
        yield workers
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """One process, and the number of pairs that it may still be asked."""

    def __init__(self, seconds: float):
        command = [sys.executable, "-m", "smolpost.synthesis.filters.answer_worker", str(seconds), str(MEMORY)]
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.left = MOST_PAIRS
        if not self.process.stdout.readline():
            self.end()
            raise RuntimeError(f"a process that checks answers did not start: {' '.join(command)}")

    def ask(self, pair: Pair) -> None:
        self.left -= 1
        with contextlib.suppress(BrokenPipeError):  # killed while idle; its end is read as that of any other
            self.process.stdin.write(json.dumps(pair).encode() + b"\n")
            self.process.stdin.flush()

    def verdict(self) -> Verdict | None:
        """The verdict on the pair asked last; None if the process ended."""
        line = self.process.stdout.readline()
        if not line.endswith(b"\n") or not self.left:
            self.end()
        return Verdict(*json.loads(line)) if line.endswith(b"\n") else None

    def ended(self) -> bool:
        return self.process.returncode is not None

    def ran_out(self) -> bool:
        """Whether the kernel ended it because of its computing time."""
        return self.process.returncode == -signal.SIGPROF

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=0.5)  # it may be ending for a reason that is still to be read
        self.process.kill()
        self.process.wait()


# ---------------------------------------------------------------- workers that stay


class _Shared:
    """Workers of this process, and who may use them."""

    def __init__(self):
        self.lock, self.workers = threading.Lock(), AnswerWorkers()


_shared = _Shared()
atexit.register(lambda: _shared.workers.close())
os.register_at_fork(after_in_child=_shared.__init__)  # those of the parent are not the child's


def verify_answers(pairs: Sequence[Pair], workers: int = 1) -> list[Verdict]:
    """`right_answer` of each (reference, answer), in processes that stay for later calls.

    Works in any thread and process, whatever the pairs hold; "undecided" where CPU_SECONDS are not enough.
    """
    with _shared.lock:
        _shared.workers.workers = workers
        return _shared.workers.verdicts(pairs)
