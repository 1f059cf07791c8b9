"""The table, the log lines and the file of a run."""

import io
import json
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from smolpost import progress
from smolpost.errors import UserError
from smolpost.synthesis import status
from smolpost.synthesis.status import Prices, RunStatus
from tests.synthesis.outcomes import record, turns


def event(number: int, failed: int = 0, found: int = 0, cut: bool = False):
    """The `number`-th finished prompt; each reply has 10 tokens of prompt and 5 of answer."""
    replied = number - failed
    counts = SimpleNamespace(done=replied, failed=failed, prompt_tokens=10 * replied, completion_tokens=5 * replied)
    kept = record(str(number), "maths", turns("?", "4"), finish_reason="length" if cut else "stop")
    return SimpleNamespace(record=kept, counts=counts, found=SimpleNamespace(done=found, failed=0))


def read(file) -> dict:
    return json.loads(file.read_text())


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(status, "TICK", 0.02)
    monkeypatch.setattr(status, "SAVE", 0.0)
    monkeypatch.setattr(progress, "LINES", 0.05)


def wait_until(true) -> None:
    deadline = time.monotonic() + 10
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


def test_file_follows_the_run(tmp_path, quick, capsys):
    file = tmp_path / "status.json"
    with RunStatus("traces", file, 100, prices=Prices(1.0, 2.0), load=lambda: (7, 32)) as watch:
        assert read(file) | {"state": "running", "done": 0, "in_flight": 7, "limit": 32} == read(file)
        for number in range(41, 51):
            watch(event(number, failed=1, found=40, cut=number % 2 == 0))
        wait_until(lambda: read(file)["done"] == 49)
        found = read(file)
    assert found["failed"] == 1 and found["found"] == 40 and found["prompts"] == 100
    assert found["cut_share"] == 0.5
    assert found["cost"] == pytest.approx((490 * 1.0 + 245 * 2.0) / 1e6)
    # 50 prompts are left, and 10 took the time so far: the 40 that were there are no basis.
    assert found["seconds_left"] == pytest.approx(5 * found["seconds"], abs=0.6)
    assert found["requests_per_second"] > 0 and found["tokens_per_second"] > 0
    assert read(file)["state"] == "finished" and read(file)["error"] is None
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("traces: prompts 50 of 100 (50%), failed 1, were there 40, requests/s ")
    assert "cut 50.0%" in lines[-1] and "finished after" in lines[-1]


def test_lines_come_while_nothing_finishes(tmp_path, quick, capsys):
    with RunStatus("traces", tmp_path / "status.json", 100, load=lambda: (3, 4)):
        told = ""

        def two_lines():
            nonlocal told
            told += capsys.readouterr().err
            return told.count("\n") >= 2

        wait_until(two_lines)
    assert told.splitlines()[0] == (
        "traces: prompts 0 of 100 (0%), failed 0, in flight 3/4, requests/s 0.0, tokens/s 0, left ?"
    )


def test_failure_is_in_the_file(tmp_path, capsys):
    file = tmp_path / "status.json"
    with pytest.raises(UserError), RunStatus("traces", file, 2):
        raise UserError("401: wrong\nkey")
    assert read(file)["state"] == "stopped" and read(file)["error"] == "UserError: 401: wrong key"
    assert "stopped after" in capsys.readouterr().err


def test_table_in_a_terminal(tmp_path, quick, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(status, "Console", lambda **_: console)
    with RunStatus("stages.traces: teacher", tmp_path / "status.json", 1000, load=lambda: (7, 32)) as watch:
        watch(event(250))
        wait_until(lambda: "7/32" in screen.getvalue())
    text = screen.getvalue()
    assert "stages.traces: teacher" in text and "250 of 1,000 (25%)" in text and "in flight" in text
    assert "cost" not in text  # no prices are set


def test_counting_costs_little(tmp_path):
    """At 1,000 prompts a second, counting may take 1% of a core: 10 microseconds each; 4 times that is allowed here."""
    events = [event(number) for number in range(1, 20_001)]
    with RunStatus("traces", tmp_path / "status.json", 20_000) as watch:
        began = time.thread_time()
        for one in events:
            watch(one)
        assert (time.thread_time() - began) / len(events) < 40e-6


def test_no_cost_without_both_prices():
    assert Prices().cost(1e6, 1e6) is None and Prices(1.0).cost(1e6, 1e6) is None
    assert Prices(0.0, 3.0).cost(1e6, 2e6) == 6.0
