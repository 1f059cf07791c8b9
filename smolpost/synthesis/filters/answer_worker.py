"""Reads (reference, answer) pairs from standard input and writes verdicts, one JSON line each; see `answer_workers`."""

import contextlib
import json
import logging
import os
import resource
import signal
import sys

from smolpost.synthesis.filters.answers import UNDECIDED, right_answer


def main(seconds: float, memory: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes the pipe
    logging.disable()
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no verdict
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = right_answer(*json.loads(line))
        except (Exception, MemoryError, RecursionError):
            verdict = UNDECIDED
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(verdict).encode() + b"\n")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
