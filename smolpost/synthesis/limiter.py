"""How many requests are under way: as many as the server takes, found out by asking."""

import asyncio
from collections import deque

START = 64  # requests under way before the server has answered one
STEPS = 16  # rounds of replies from nothing to the limit, once the server was overloaded


class Limiter:
    """A semaphore whose width follows the server: additive increase, multiplicative decrease.

    It begins at 64 and doubles with each round of replies, as TCP's slow start does, up to the limit or the first sign
    of overload. A sign of overload halves the width, once for all requests that were under way together. From then on
    a round of replies adds a sixteenth of the limit.

    Args:
        limit: Requests under way at most.
    """

    def __init__(self, limit: int):
        self.limit, self.under_way = limit, 0
        self._width = float(min(limit, START))
        self._cuts = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def width(self) -> int:
        """Requests that may be under way now, at least 1."""
        return int(self._width)

    async def acquire(self, *, first: bool = False) -> int:
        """Wait for a place.

        Args:
            first: Before all that wait, for a request that has waited before.
        Returns:
            What `overloaded` wants to be told by this request.
        """
        if self.under_way < self.width and not self._waiting:
            self.under_way += 1
            return self._cuts
        turn = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if first else self._waiting.append)(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.release()  # the place was given just before
            raise
        return self._cuts

    def release(self) -> None:
        self.under_way -= 1
        while self._waiting and self.under_way < self.width:
            turn = self._waiting.popleft()
            if not turn.done():
                self.under_way += 1
                turn.set_result(None)

    def answered(self) -> None:
        """A request got its reply. To be called before `release`."""
        if self._waiting:  # else nothing is gained, and an unused width says nothing about what the server takes
            step = max(1.0, self.limit / STEPS) / self._width if self._cuts else 1.0
            self._width = min(float(self.limit), self._width + step)

    def overloaded(self, when: int) -> None:
        """The server could not take a request. To be called before `release`.

        Args:
            when: From this request's `acquire`. All that were under way at a cut may tell the same; only one counts.
        """
        if when == self._cuts:
            self._cuts += 1
            self._width = max(1.0, min(self._width, self.under_way) / 2)
