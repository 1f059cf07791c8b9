"""The width of a teacher's requests."""

import asyncio
import itertools

from smolpost.synthesis.limiter import Limiter


def test_the_width_doubles_then_halves_once_then_grows_in_steps():
    async def rounds():
        limiter, widths = Limiter(256), []
        crowd = [asyncio.ensure_future(limiter.acquire()) for _ in range(5000)]

        async def one_round(tell):
            await asyncio.sleep(0)
            for when in [turn.result() for turn in crowd if turn.done()]:
                tell(when)
                limiter.release()
            crowd[:] = [turn for turn in crowd if not turn.done()]
            widths.append(limiter.width)

        for _ in range(4):
            await one_round(lambda when: limiter.answered())
        await one_round(limiter.overloaded)
        for _ in range(10):
            await one_round(lambda when: limiter.answered())
        return widths

    widths = asyncio.run(rounds())
    assert widths[:4] == [128, 256, 256, 256]
    assert widths[4] == 128
    steps = [after - before for before, after in itertools.pairwise(widths[4:])]
    assert all(10 <= step <= 16 for step in steps[:8]) and widths[-1] == 256


def test_a_width_that_nobody_needs_does_not_grow():
    async def alone():
        limiter = Limiter(256)
        for _ in range(100):
            await limiter.acquire()
            limiter.answered()
            limiter.release()
        return limiter.width, Limiter(4).width

    assert asyncio.run(alone()) == (64, 4)


def test_a_place_is_never_lost_or_given_twice():
    async def crowd():
        limiter, most = Limiter(5), 0
        limiter._width = 5.0

        async def one(number):
            nonlocal most
            await limiter.acquire(first=number % 7 == 0)
            most = max(most, limiter.under_way)
            try:
                await asyncio.sleep(0.001 * (number % 3))
            finally:
                limiter.release()

        tasks = [asyncio.ensure_future(one(number)) for number in range(200)]
        for number, task in enumerate(tasks):
            if number % 3 == 0:
                await asyncio.sleep(0)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return most, limiter.under_way

    assert asyncio.run(crowd()) == (5, 0)
