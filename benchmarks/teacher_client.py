"""Requests to a teacher's server: our client against bare loops of aiohttp, which it uses, and of httpx2.

python benchmarks/teacher_client.py [--quick]

Each side asks the same number of questions of the same loopback server, 32 and 256 at a time, with one worker per
request under way. The server takes 0.25 s per reply on average, or answers at once: then the client is the limit. Ours
does more per request: it counts what is under way, retries, and checks and keeps replies. It begins with 64 requests
under way and doubles them with each round of replies, which is part of what is measured. "CPU ms" is the processor time
of the client per request.
"""

import asyncio
import functools
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from side_by_side import ROOT, alternate, keep, options, run_side, show

sys.path.insert(0, str(ROOT))  # the server is one of the tests'

TARGET = 0.95  # of the bare loop's requests per second, with a server that takes its time
WORDS = "word " * 100  # of a question
Ask = Callable[[int], Awaitable[str]]


def body(number: int) -> bytes:
    messages = [{"role": "user", "content": f"{number} {WORDS}"}]
    settings = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768, "seed": number}
    return json.dumps({"model": "teacher", "messages": messages, **settings}).encode()


async def ours(url: str, in_flight: int, work: Callable[[Ask], Awaitable[dict]]) -> dict:
    from smolpost.synthesis.client import ChatEngine
    from smolpost.synthesis.records import Request
    from smolpost.synthesis.settings import Teacher

    async def ask(number: int) -> str:
        return (await engine.ask(Request([{"role": "user", "content": f"{number} {WORDS}"}], None, number))).content

    async with ChatEngine(Teacher(model="teacher", url=url, concurrency=in_flight), key="teacher") as engine:
        return await work(ask)


async def bare_aiohttp(url: str, in_flight: int, work: Callable[[Ask], Awaitable[dict]]) -> dict:
    import aiohttp

    async def ask(number: int) -> str:
        async with session.post(f"{url}/chat/completions", data=body(number), headers=headers) as response:
            return (await response.json())["choices"][0]["message"]["content"]

    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=in_flight)) as session:
        return await work(ask)


async def bare_httpx2(url: str, in_flight: int, work: Callable[[Ask], Awaitable[dict]]) -> dict:
    import httpx2

    async def ask(number: int) -> str:
        response = await client.post(f"{url}/chat/completions", content=body(number), headers=headers)
        return response.json()["choices"][0]["message"]["content"]

    headers = {"Content-Type": "application/json"}
    limits = httpx2.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    async with httpx2.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:
        return await work(ask)


def measure(side: Callable[..., Awaitable[dict]], case: dict) -> dict:
    """Requests, seconds and processor time of one side."""
    from tests.synthesis.fault_server import start_fault_server

    async def work(ask: Ask) -> dict:
        numbers = iter(range(case["requests"]))

        async def worker() -> None:
            for number in numbers:
                assert (await ask(number)).startswith(f"answer to {number} ")

        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(worker() for _ in range(case["in_flight"])))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return {"requests": case["requests"], "seconds": seconds, "cpu_seconds": cpu}

    with (
        tempfile.TemporaryDirectory() as folder,
        start_fault_server(Path(folder), latency=case["latency"], fsync=False) as server,
    ):
        return asyncio.run(side(server.url, case["in_flight"], work))


def main() -> None:
    arguments = options(__doc__.splitlines()[0], needs_data=False)
    sides = {"smolpost": ours, "aiohttp": bare_aiohttp, "httpx2": bare_httpx2}
    if run_side({name: functools.partial(measure, side) for name, side in sides.items()}, arguments):
        return
    rounds = 4 if arguments.quick else 64
    cases = {
        f"{in_flight} in flight, {latency:g} s per reply": {
            "in_flight": in_flight, "latency": latency, "requests": in_flight * rounds if latency else rounds * 100,
        }
        for latency in (0.25, 0.0) for in_flight in (32, 256)
    }  # fmt: skip
    if arguments.quick:
        arguments.repeats = 1
    results, table = [], []
    for name, case in cases.items():
        found = alternate(list(sides), case, arguments)
        speed = {side: run["requests"] / run["seconds"] for side, run in found.items()}
        ratio = {side: speed["smolpost"] / speed[side] for side in ("aiohttp", "httpx2")}
        target = {"speed": TARGET} if case["latency"] else None
        results.append({"case": name, "settings": case, "sides": found, "ratio": ratio, "target": target})
        for side, run in found.items():
            cpu = 1000 * run["cpu_seconds"] / run["requests"]
            table.append(
                {"case": name, "side": side, "requests/s": speed[side], "ours to it": ratio.get(side), "CPU ms": cpu}
            )
    show(f"a teacher's server; target {TARGET:g} of bare aiohttp where replies take time", table)
    keep("teacher_client", arguments, results)


if __name__ == "__main__":
    main()
