"""One bar for the user, whatever calls what; plain lines where nobody watches; estimates from this run's own units."""

import io
import re

import pytest

from smolpost import progress
from smolpost.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def work(clock, bar, units, seconds=1.0):
    for _ in range(units):
        clock[0] += seconds
        bar.update()


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (42.4, "42 s"),
        (99, "99 s"),
        (100, "2 min"),
        (719, "12 min"),
        (5999, "1 h 40 min"),
        (12000, "3 h 20 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_log_file_gets_a_line_every_half_minute_and_one_at_the_end(clock, capsys):
    with Progress("tokenize", 100, "row") as bar:
        work(clock, bar, 100)
    assert capsys.readouterr().err.splitlines() == [
        "tokenize, 30 of 100 rows, 30%, about 70 s left",
        "tokenize, 60 of 100 rows, 60%, about 40 s left",
        "tokenize, 90 of 100 rows, 90%, about 10 s left",
        "tokenize: 100 rows in 2 min",
    ]


def test_what_an_earlier_run_did_is_where_the_bar_starts_and_no_basis_for_an_estimate(clock, capsys):
    with Progress("tokenize", 100, "row", done=40) as bar:
        bar.find(20)
        work(clock, bar, 40)
    assert capsys.readouterr().err.splitlines() == [
        "tokenize, 90 of 100 rows, 90%, about 10 s left",
        "tokenize: 100 rows in 40 s (60 were there)",
    ]
    with Progress("tokenize", 100, "row", done=100):
        clock[0] += 500
    assert capsys.readouterr().err == ""


def test_what_is_open_inside_moves_the_outer_bar_and_says_nothing_itself(clock, capsys):
    with Progress("sweep", 3, "point") as points:
        for _ in range(3):
            with Progress("tasks", 2, "task") as tasks:
                for name in ("recall", "reasoning"):
                    with Progress(f"{name}: prompts", 5, "prompt", aside=True) as prompts:
                        work(clock, prompts, 5, seconds=0)
                    with Progress(name, 50, "item") as items:
                        work(clock, items, 50)
                    tasks.update()
            points.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "sweep, 0 of 3 points (recall), 10%, about 4 min left",
        "sweep, 0 of 3 points (reasoning), 20%, about 4 min left",
    ]
    assert lines[-1] == "sweep: 3 points in 5 min" and len(lines) == 10
    shares = [int(re.search(r"(\d+)%", line)[1]) for line in lines[:-1]]
    assert shares == sorted(shares)


def test_a_failure_is_not_announced_as_an_end(clock, capsys):
    with pytest.raises(ValueError), Progress("pairs", 2, "row") as bar:
        work(clock, bar, 1)
        raise ValueError
    assert capsys.readouterr().err == ""
    with Progress("pairs", 2, "row") as bar:  # and the next one is not inside it
        work(clock, bar, 2)
    assert capsys.readouterr().err == "pairs: 2 rows in 2 s\n"


def test_a_rank_that_is_not_asked_says_nothing(clock, capsys):
    with Progress("reference", 100, "pair", shown=False) as bar:
        work(clock, bar, 100)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text, seconds", [(None, None), ("", None), ("90", 90.0)])
def test_a_training_knows_what_its_run_needs_later(monkeypatch, text, seconds):
    monkeypatch.delenv(progress.LATER, raising=False)
    if text is not None:
        monkeypatch.setenv(progress.LATER, text)
    assert progress.seconds_later() == seconds


def test_work_with_lines_of_its_own_gets_only_the_last_one(clock, capsys):
    with Progress("train", 100, "step", lines=False) as bar:
        work(clock, bar, 100)
    assert capsys.readouterr().err == "train: 100 steps in 2 min\n"


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_bar(clock, monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    with Progress("sweep", 4, "point", done=1) as points:
        for _ in range(3):
            with Progress("recall", 10, "item") as items:
                work(clock, items, 10)
            points.update()
    frames = [frame for frame in screen.getvalue().split("\r") if frame.strip()]
    assert frames[0].startswith("sweep, 1 of 4 points:  25%|") and frames[-1].startswith("sweep, 4 of 4 points: 100%|")
    assert all(frame.startswith("sweep, ") for frame in frames)
    assert any(frame.startswith("sweep, 2 of 4 points (recall):  65%|") for frame in frames)
    assert screen.getvalue().count("\n") == 1  # nothing below the bar, until it is done
