"""Whole runs against a chat server on loopback beside bare clients, and runs of a million prompts.

python benchmarks/teacher_run.py [--quick]

The server answers after half a second, and the clients keep 32 and 256 requests in flight. "run" is what a stage does:
prompts are written and hashed, failed requests are tried again, and each reply and record goes to the disk. "aiohttp"
and "httpx2" only post the same requests and parse the replies. Requests per second count all of the time, from the
first prompt to the last record. A run begins with 32 requests in flight and doubles them with each round of replies, so
a short run shows less than its speed.

Then a run is planned over many prompts, stopped by its teacher after 5,000 replies, and continued until it is stopped
again: the time and the memory that prompts cost which are not asked about yet.
"""

import asyncio
import contextlib
import functools
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

import aiohttp
import httpx2
from side_by_side import ROOT, alternate, keep, one_run, options, run_side, show

from smolpost.errors import UserError
from smolpost.synthesis.client import ChatEngine
from smolpost.synthesis.records import Ask, Prompt, Reply, Request, Sample
from smolpost.synthesis.run import generate
from smolpost.synthesis.settings import Generation, Teacher

TARGET = 0.95  # of a bare client's requests per second
STOP_AFTER = 5_000  # replies, in a run that is planned for many more


def prompts(number: int, length: int) -> Iterator[Prompt]:
    for i in range(number):
        messages = [{"role": "user", "content": f"Question {i}: {'why ' * (length // 4)}"}]
        yield Prompt(f"prompt-{i}", "benchmark", {"messages": messages})


async def converse(prompt: Prompt, ask: Ask) -> list[Sample]:
    reply = await ask(Request(prompt.row["messages"], True, seed=0))
    return [Sample([*prompt.row["messages"], {"role": "assistant", "content": reply.content}], [reply])]


def whole_run(case: dict, folder: Path) -> None:
    teacher = Teacher(
        model="teacher", server="vllm", url=case["url"], concurrency=case["in_flight"], max_new_tokens=4096
    )
    counts = generate(
        folder, prompts(case["prompts"], case["length"]), converse, ChatEngine(teacher, key="teacher"), Generation(),
        fingerprint={}, concurrency=case["in_flight"],
    )  # fmt: skip
    assert counts.done == case["prompts"]


async def with_aiohttp(case: dict, folder: Path) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def post(url: str, body: dict) -> dict:
            async with session.post(url, json=body) as response:
                return json.loads(await response.read())

        await bare(case, post)


async def with_httpx2(case: dict, folder: Path) -> None:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=case["in_flight"])
    async with httpx2.AsyncClient(limits=limits, timeout=None) as session:

        async def post(url: str, body: dict) -> dict:
            return (await session.post(url, json=body)).json()

        await bare(case, post)


async def bare(case: dict, post: Callable[[str, dict], Awaitable[dict]]) -> None:
    """Post the requests of all prompts, so many at a time, and do nothing with the replies."""

    async def one_after_the_other(mine: Iterable[Prompt]) -> None:
        for prompt in mine:
            body = {"model": "teacher", "seed": 0, "temperature": 0.6, "top_p": 0.95, "max_tokens": 4096}
            kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
            reply = await post(case["url"] + "/chat/completions", {**body, **kwargs, **prompt.row})
            assert reply["choices"][0]["message"]["content"]

    shared = prompts(case["prompts"], case["length"])
    await asyncio.gather(*(one_after_the_other(shared) for _ in range(case["in_flight"])))


class Stopping:
    """A teacher in this process that ends the run after some replies."""

    def __init__(self):
        self.left = STOP_AFTER

    async def __aenter__(self) -> "Stopping":
        return self

    async def __aexit__(self, *error) -> None:
        pass

    async def identity(self) -> dict:
        return {"model": "benchmark"}

    async def ask(self, request: Request) -> Reply:
        await asyncio.sleep(0)
        self.left -= 1
        if self.left < 0:
            raise UserError("enough")
        return Reply("an answer", None, "stop", prompt_tokens=100, completion_tokens=2)


def until_stopped(case: dict) -> dict:
    """Plan or continue a run over many prompts."""
    began = time.perf_counter()
    with contextlib.suppress(UserError):
        generate(
            Path(case["folder"]), prompts(case["prompts"], case["length"]), converse, Stopping(), Generation(),
            fingerprint={}, concurrency=256,
        )  # fmt: skip
    return {"seconds": time.perf_counter() - began}


def measure(work: Callable[[dict, Path], Awaitable | None], case: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        began, cpu = time.perf_counter(), time.process_time()
        if (result := work(case, Path(folder) / "run")) is not None:
            asyncio.run(result)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "requests_per_second": case["prompts"] / seconds, "cpu_ms": 1e3 * cpu / case["prompts"]}


CLIENTS = {"run": whole_run, "aiohttp": with_aiohttp, "httpx2": with_httpx2}
SIDES = {name: functools.partial(measure, work) for name, work in CLIENTS.items()}
SIDES |= {"planned": until_stopped, "continued": until_stopped}


def beside_bare_clients(cases: dict[str, dict], arguments: Namespace) -> list[dict]:
    table, results = [], []
    for name, case in cases.items():
        sides = alternate(list(CLIENTS), case, arguments)
        speed = {side: found["requests_per_second"] for side, found in sides.items()}
        results.append({"case": name, "settings": case, "sides": sides, "target": TARGET,
                        "ratio": {side: speed["run"] / speed[side] for side in speed if side != "run"}})  # fmt: skip
        table += [
            {"case": name, "side": side, "requests/s": speed[side], "run over it": speed["run"] / speed[side],
             "CPU ms/request": found["cpu_ms"], "peak GB": found["peak_gb"]}
            for side, found in sides.items()
        ]  # fmt: skip
    show(f"Whole runs beside bare clients; target {TARGET} of their requests/s", table)
    return results


def of_many_prompts(numbers: list[int], arguments: Namespace) -> list[dict]:
    table = []
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            case = {"prompts": number, "length": 500, "folder": f"{folder}/run"}
            table += [
                {"case": f"{number:,} prompts", "side": side} | one_run(side, case, arguments)
                for side in ("planned", "continued")
            ]
    show(f"Runs that are stopped after {STOP_AFTER:,} replies", table)
    return table


def main() -> None:
    arguments = options(__doc__.splitlines()[0], needs_data=False)
    if run_side(SIDES, arguments):
        return
    sys.path.insert(0, str(ROOT))
    from tests.synthesis.fault_server import start_fault_server

    sizes, latency, numbers = {32: 1_600, 256: 16_000}, 0.5, [100_000, 1_000_000]
    if arguments.quick:
        arguments.repeats, sizes, latency, numbers = 1, {32: 400}, 0.2, [10_000]
    with tempfile.TemporaryDirectory() as folder, start_fault_server(
        Path(folder), latency=latency, fsync=False
    ) as server:  # fmt: skip
        cases = {
            f"{in_flight} in flight": {"url": server.url, "in_flight": in_flight, "prompts": number, "length": 2_000}
            for in_flight, number in sizes.items()
        }
        results = beside_bare_clients(cases, arguments)
    keep("teacher_run", arguments, results + of_many_prompts(numbers, arguments))


if __name__ == "__main__":
    main()
