"""A teacher behind an OpenAI-compatible server, asked over HTTP.

What a user may rely on:

- A request is tried until its deadline: on 408, 409, 425, 429 and 5xx, on time-outs and lost connections. Before each
  further try it waits a random time of at most 1, 2, 4 ... 60 s (full jitter), and at least what Retry-After says.
- Ten tries at most end in status 500 or in a body that is not a chat completion: no JSON, no choices, a choice without
  message or finish_reason. Each of them costs the server its work. A message without text is a reply; filters judge it.
- Any other status of 4xx fails the request at once, and the run goes on.
- 401, 402, 403, 404, 405, 407 and redirects say that no request can succeed. They end the run.
- A server that cannot be reached is waited for: one line says so, and another one that it is back. That time does not
  count for the requests' deadlines. A server that cannot be reached for one deadline ends the run.
- As many failed requests in a row as may be under way (at least 16) end the run.
"""

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from smolpost.errors import UserError
from smolpost.progress import duration
from smolpost.synthesis.connection import Connection, Fault, checked_url, message_of
from smolpost.synthesis.identity import AGAIN, hopeless, identify
from smolpost.synthesis.limiter import Limiter
from smolpost.synthesis.probe import probe
from smolpost.synthesis.profiles import PROFILES
from smolpost.synthesis.records import Reply, Request, RequestFailed
from smolpost.synthesis.replies import reply_of
from smolpost.synthesis.settings import Teacher

BASE, CAP = 1.0, 60.0  # seconds of the first wait and of the longest one, before jitter
KNOCK = 5.0  # seconds of the longest wait for a server that cannot be reached: a knock costs it nothing
USELESS = 10  # tries that the server works on without giving a reply
FAILURES = 16  # failed requests in a row that end the run, where fewer may be under way

_jitter = random.Random()  # its own, so that nobody's seeded numbers move


class ChatEngine:
    """A TeacherEngine over HTTP. Outside its context it holds no connection and no key, and can be pickled.

    Args:
        teacher: With a `url`.
        key: Of the teacher in the recipe, for messages: stages.traces.teacher.
        modes: Values of `Request.thinking` that `identity` tries; None: the teacher's own.
    Raises:
        UserError: The URL cannot be one. On entering: the variable of `api_key_env` is not set.
    """

    def __init__(self, teacher: Teacher, *, key: str, modes: Collection[bool | None] | None = None):
        self.teacher, self.key = teacher, key
        self.modes = (teacher.thinking,) if modes is None else modes
        self.url = checked_url(teacher.url, key)
        self._limiter = Limiter(teacher.concurrency)

    async def __aenter__(self) -> "ChatEngine":
        self._model = self.teacher.model
        self._connection = await Connection(self.url, self.teacher.api_key_env, key=self.key).__aenter__()
        self._outage = _Outage(self._connection.shown)
        self._end: UserError | None = None
        self._ended = asyncio.Event()
        self._failed_in_a_row = 0
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._connection.__aexit__(*error)

    @property
    def width(self) -> int:
        """Requests that may be under way now: the teacher's concurrency, or fewer while the server is overloaded."""
        return self._limiter.width

    @property
    def under_way(self) -> int:
        return self._limiter.under_way

    # ------------------------------------------------------------ asking

    async def ask(self, request: Request) -> Reply:
        payload = {"model": self._model} | PROFILES[self.teacher.server].payload(self.teacher, request)
        body = json.dumps(payload).encode()
        tries: list[Fault] = []
        first = due = 0.0  # when the first try began, and when the last one has to end
        while True:
            when = await self._limiter.acquire(first=bool(tries))
            began = time.monotonic()
            if not tries:  # the wait for the first turn is not the server's fault
                first, due = began, began + self.teacher.deadline
            try:
                if self._end:
                    raise self._end
                if tries and began >= due:
                    raise self._late(tries)
                outcome = await self._try(body, due - began)
                if not isinstance(outcome, Fault):
                    self._limiter.answered()
                elif outcome.overload:
                    self._limiter.overloaded(when)
            finally:
                self._limiter.release()
            if not isinstance(outcome, Fault):
                self._failed_in_a_row = 0
                return reply_of(
                    outcome["choices"][0],
                    asked_to_think=request.thinking,
                    usage=outcome.get("usage"),
                    attempts=len(tries) + 1,
                    seconds=time.monotonic() - first,
                )
            tries.append(outcome)
            await self._wait(tries, due)
            if outcome.unreached:
                due += time.monotonic() - began

    async def _try(self, body: bytes, left: float) -> dict[str, Any] | Fault:
        """A chat completion, or what was wrong.

        Raises:
            UserError: No request can succeed.
        """
        timeout = min(self.teacher.request_timeout, left)
        content = await self._connection.send("POST", f"{self.url}/chat/completions", timeout, body)
        if not isinstance(content, Fault):
            self._outage.end()
            return checked(content)
        if content.unreached:
            self._outage.begin(content)
        elif content.status is not None:
            self._outage.end()
        if content.hopeless:
            raise self._stop(await hopeless(self._connection, self._model, content))
        return content

    async def _wait(self, tries: list[Fault], due: float) -> None:
        """Wait before the next try.

        Raises:
            RequestFailed: There is none.
            UserError: There is none for any request.
        """
        fault, now = tries[-1], time.monotonic()
        longest = min(KNOCK if fault.unreached else CAP, BASE * 2 ** min(len(tries) - 1, 10))
        wait = max(fault.wait, _jitter.uniform(0, longest))
        if fault.unreached:
            if (out := self._outage.seconds()) >= self.teacher.deadline:
                raise self._stop(
                    f"{self._connection.shown} could not be reached for {duration(out)} ({fault}); start it, "
                    f"and {AGAIN}"
                )
            await self._outage.sleep(min(wait, self.teacher.deadline - out))
        elif not fault.retried:
            raise self._failed(tries, str(fault))
        elif sum(one.useless for one in tries) >= USELESS:
            raise self._failed(tries, f"no reply in {len(tries)} tries, the last one: {fault}")
        elif now + wait >= due:
            raise self._late(tries)
        else:
            await _sleep(self._ended, wait)

    def _late(self, tries: list[Fault]) -> Exception:
        spent = duration(self.teacher.deadline)
        # The deadline itself cuts the last try: what the server said before tells more.
        said = next((fault for fault in reversed(tries) if not fault.timed_out), tries[-1])
        return self._failed(tries, f"no reply in {len(tries)} tries within {spent}, the last one: {said}")

    def _failed(self, tries: list[Fault], reason: str) -> Exception:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= max(FAILURES, self.teacher.concurrency):
            return self._stop(
                f"{self._connection.shown} failed {self._failed_in_a_row:,} requests in a row, the last one with "
                f"{reason}; mend the cause, and {AGAIN}"
            )
        runs = [(name, sum(1 for _ in run)) for name, run in itertools.groupby(fault.name for fault in tries)]
        return RequestFailed(reason, tuple(name if times == 1 else f"{name} x {times}" for name, times in runs))

    def _stop(self, why: str) -> UserError:
        """End all requests: those that wait end with the same line."""
        self._end = self._end or UserError(why)
        self._ended.set()
        self._outage.wake()
        return self._end

    async def identity(self) -> dict[str, Any]:
        self._model, facts = await identify(self._connection, self.teacher)
        asked = replace(self.teacher, model=self._model)
        return facts | {"modes": await probe(self.ask, asked, self.modes, key=self.key)}


def checked(content: dict[str, Any]) -> dict[str, Any] | Fault:
    """A body of status 200, or what keeps it from being a chat completion."""
    choices = content.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    said = message_of(content)
    if not isinstance(choice, dict):
        return Fault("no choices", said, 200)
    if not isinstance(choice.get("message"), dict):
        return Fault("no message", said, 200)
    if not isinstance(choice.get("finish_reason"), str):
        return Fault("no finish_reason", said, 200)
    return content


class _Outage:
    """A time in which the server cannot be reached, said once at its begin and once at its end."""

    def __init__(self, shown: str):
        self._shown, self._since, self._back = shown, None, asyncio.Event()

    def begin(self, fault: Fault) -> None:
        if self._since is None:
            self._since = time.monotonic()
            self._back.clear()
            print(f"{self._shown} cannot be reached ({fault}); waiting for it", flush=True)

    def end(self) -> None:
        if self._since is not None:
            print(f"{self._shown} is back after {duration(self.seconds())}", flush=True)
            self._since = None
            self.wake()

    def seconds(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since

    def wake(self) -> None:
        self._back.set()

    async def sleep(self, seconds: float) -> None:
        """Until the server is back, but not longer than so many seconds."""
        await _sleep(self._back, seconds)


async def _sleep(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
