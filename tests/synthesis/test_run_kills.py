"""Runs in processes of their own, against a server in another one: both are killed, stopped and started again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from smolpost.synthesis.run import records
from tests.synthesis.fault_server import start_fault_server

ROOT = Path(__file__).parents[2]
CONCURRENCY = 8
CHILD = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from smolpost.cli import one_line_errors
from smolpost.synthesis.client import ChatEngine
from smolpost.synthesis.run import generate
from smolpost.synthesis.settings import Teacher
from tests.synthesis import fakes

folder, url, number, concurrency, converse, changes = sys.argv[1:]
changes = {"task": None, "tasks": 1, "retry_failed": False} | json.loads(changes)
teacher = Teacher(model="teacher", server="vllm", url=url, concurrency=int(concurrency), max_new_tokens=64)
with one_line_errors():
    counts = generate(
        Path(folder), fakes.make_prompts(int(number)), getattr(fakes, converse),
        ChatEngine(teacher, key="teacher", modes=()),  # no question of its own, so that the server's log is the run's
        SimpleNamespace(chunk_size=20, tasks=changes["tasks"], retry_failed=changes["retry_failed"]),
        fingerprint={"temperature": teacher.temperature}, concurrency=teacher.concurrency, task=changes["task"],
    )
    print(json.dumps(counts))
"""


def start(folder, server, number, converse="once", **changes):
    words = [sys.executable, "-c", CHILD, str(folder), server.url, str(number), str(CONCURRENCY), converse]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*words, json.dumps(changes)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(child):
    """Counts of a run that ends well."""
    out, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    return json.loads(out.splitlines()[-1])


def wait_for(server, number, child=None):
    """Until the server has answered so many requests."""
    deadline = time.monotonic() + 120
    while len(server.requests(200)) < number:
        assert time.monotonic() < deadline and (child is None or child.poll() is None)
        time.sleep(0.02)


def asked(server):
    """Last turn of a prompt -> number of answered requests; those of the probe are left out."""
    return Counter(line["prompt"] for line in server.requests(200) if line["prompt"][0].isdigit())


def test_kill_9_of_the_client_loses_at_most_what_was_under_way(tmp_path):
    draw, kills, number = random.Random(0), 4, 120
    with start_fault_server(tmp_path / "server", latency=0.1) as server:
        for _ in range(kills):
            child = start(tmp_path / "r", server, number, "three_turns")
            wait_for(server, len(server.requests(200)) + draw.randint(5, 60), child)
            time.sleep(draw.random() * 0.1)
            child.kill()
            child.communicate()
        counts = finish(start(tmp_path / "r", server, number, "three_turns"))
        answered = asked(server)
    assert counts[:3] == [number, number, 0]
    kept = list(records(tmp_path / "r"))
    assert [record.id for _, record in kept] == [f"p{i}" for i in range(number)]
    assert all(len(record.samples[0].replies) == 3 for _, record in kept)
    assert len(answered) == 3 * number
    assert answered.total() <= 3 * number + kills * CONCURRENCY


def test_kill_9_of_the_server_only_makes_the_run_wait(tmp_path):
    with start_fault_server(tmp_path / "server", latency=0.1) as server:
        child = start(tmp_path / "r", server, 100)
        for answered in (15, 45):
            wait_for(server, answered, child)
            server.kill()
            time.sleep(0.5)
            server.start()
        counts = finish(child)
        answered = asked(server)
    assert counts[:3] == [100, 100, 0]
    assert len(answered) == 100 and answered.total() <= 100 + 2 * CONCURRENCY
    assert len(list(records(tmp_path / "r"))) == 100


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_within_seconds_with_one_line(tmp_path, number):
    with start_fault_server(tmp_path / "server", latency=0.2) as server:
        child = start(tmp_path / "r", server, 60, "three_turns")
        wait_for(server, 20, child)
        child.send_signal(number)
        began = time.monotonic()
        out, error = child.communicate(timeout=60)
        name = {signal.SIGINT: "ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
        assert error == f"smolpost: stopped by {name}; the same command continues here\n" and out == ""
        assert child.returncode == 128 + number and time.monotonic() - began < 5
        assert finish(start(tmp_path / "r", server, 60, "three_turns"))[:3] == [60, 60, 0]
        assert asked(server).total() <= 180 + CONCURRENCY


def test_two_processes_share_a_run_without_overlap(tmp_path):
    with start_fault_server(tmp_path / "server", latency=0.1) as server:
        children = [start(tmp_path / "r", server, 90, task=task, tasks=2) for task in (0, 1)]
        counts = [finish(child) for child in children]
        answered = asked(server)
    assert set(answered.values()) == {1} and len(answered) == 90
    assert [90, 90, 0] in [found[:3] for found in counts]
    assert len(list(records(tmp_path / "r"))) == 90


def test_a_wrong_key_is_one_line_and_the_rest_goes_on_later(tmp_path):
    with start_fault_server(tmp_path / "server", latency=0.02, unauthorized_after=25) as server:
        child = start(tmp_path / "r", server, 60)
        error = child.communicate(timeout=60)[1]
        assert child.returncode == 2 and error.startswith("smolpost: ") and error.count("\n") == 1 and "401" in error
        server.kill()
        server.start(unauthorized_after=None)
        assert finish(start(tmp_path / "r", server, 60))[:3] == [60, 60, 0]
        answered = asked(server)
        assert len(answered) == 60 and answered.total() <= 60 + CONCURRENCY
