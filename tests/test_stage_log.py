"""What a stage's commands print is kept: whole lines, of all ranks, without bars and secrets, up to a kill."""

import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from tqdm import tqdm

from smolpost import cli, progress, stage_log
from smolpost.errors import UserError
from smolpost.progress import Progress
from tests.test_progress import Screen, work


@pytest.fixture
def log(tmp_path):
    return tmp_path / "logs" / "sft-0123456789ab.log"


def kept(log):
    """Its lines, without times, host and process."""
    return [re.sub(r"^--- \S+ (\w+)( begins)?.*", r"--- \1\2", line) for line in log.read_text().splitlines()]


def test_lines_go_to_both_and_the_command_has_a_start_and_an_end(log, capsys):
    with stage_log.command():
        stage_log.begin(log, "make")
        assert stage_log.is_held(log)
        print("one line")
        print("in two ", end="")
        print("parts", file=sys.stderr)
        print("and the rest")
        print("without an end", end="", flush=True)
        stage_log.begin(log.with_name("other.log"), "eval")  # one log for a command
    assert kept(log) == [
        "--- make begins", "one line", "parts", "in two and the rest", "without an end", "--- ends"
    ]  # fmt: skip
    assert capsys.readouterr().out == "one line\nin two and the rest\nwithout an end"
    assert not stage_log.is_held(log) and not log.with_name("other.log").exists()
    state = stage_log.state(log)
    assert (state["command"], state["exit_code"], state["process"]) == ("make", 0, os.getpid())
    print("after it")
    assert "after it" not in log.read_text()


def test_outside_of_a_command_and_on_a_disk_that_cannot_be_written_nothing_is_kept(log, tmp_path, capsys):
    stage_log.begin(log, "make")
    assert not log.exists()
    (tmp_path / "file").touch()
    with stage_log.command():
        stage_log.begin(tmp_path / "file" / "logs" / "sft.log", "make")
        print("shown")
    assert capsys.readouterr().out == "shown\n"


def test_a_refusal_a_traceback_and_a_stop_are_kept_with_their_exit_codes(log, monkeypatch):
    def fail(error):
        stage_log.begin(log, "train")
        raise error

    with pytest.raises(SystemExit), cli.one_line_errors():
        fail(UserError("stages.sft.max_seq_len=9 is too short"))
    assert kept(log)[-2:] == ["smolpost: stages.sft.max_seq_len=9 is too short", "--- ends"]
    found = stage_log.state(log)
    assert (found["exit_code"], found["said"]) == (2, "stages.sft.max_seq_len=9 is too short")
    monkeypatch.setattr(stage_log, "_hidden", {"hf_abcdef": "TOKEN"})
    with pytest.raises(ZeroDivisionError), cli.one_line_errors():
        fail(ZeroDivisionError("of\nhf_abcdef"))
    assert "hf_abcdef" not in log.read_text() and "Traceback (most recent call last):" in kept(log)
    assert stage_log.state(log)["said"] == "ZeroDivisionError: of TOKEN"
    with pytest.raises(SystemExit), cli.one_line_errors():
        fail(cli.signals.Stopped(signal.SIGTERM, " at step 3"))
    assert stage_log.state(log)["exit_code"] == 143
    assert kept(log)[-2] == "smolpost: stopped by SIGTERM at step 3; the same command continues here"


def test_bars_stay_on_the_terminal_and_the_log_gets_lines(log, monkeypatch):
    screen, clock = Screen(), [1000.0]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with stage_log.command():
        stage_log.begin(log, "make")
        with Progress("tokenize", 100, "row") as bar:
            work(clock, bar, 50)
            tqdm.write("a line above the bar")
            work(clock, bar, 50)
        print("\x1b[1mcoloured\x1b[0m")
    assert kept(log)[1:-1] == [
        "tokenize, 30 of 100 rows, 30%, about 70 s left",
        "a line above the bar",
        "tokenize, 60 of 100 rows, 60%, about 40 s left",
        "tokenize, 90 of 100 rows, 90%, about 10 s left",
        "tokenize: 100 rows in 2 min",
        "coloured",
    ]
    assert "\rtokenize, 50 of 100 rows:  50%|" in screen.getvalue()


def test_loggers_of_libraries_and_other_ranks_write_into_it_and_secrets_do_not(log, monkeypatch, capfd):
    logger, handler = logging.getLogger("a.library"), logging.StreamHandler(open(2, "w", closefd=False))  # noqa: SIM115
    logger.addHandler(handler)
    monkeypatch.setattr(stage_log, "_hidden", {})
    stage_log.hide({"hf_abcdef": "${oc.env:TOKEN}"})
    monkeypatch.setattr(sys, "stderr", open(2, "w", buffering=1, closefd=False))  # noqa: SIM115
    try:
        with stage_log.command():
            stage_log.begin(log, "train")
            logger.warning("careful with hf_abcdef")
        monkeypatch.setenv("RANK", "1")
        with stage_log.command():
            stage_log.begin(log, "train")
            print("here too")
    finally:
        logger.removeHandler(handler)
    assert kept(log) == ["--- train begins", "careful with ${oc.env:TOKEN}", "--- ends", "[rank 1] here too"]
    assert "careful with" in capfd.readouterr().err


PROGRAM = """
import sys, time
from pathlib import Path
from smolpost import stage_log
with stage_log.command():
    stage_log.begin(Path(sys.argv[1]), "train")
    for step in range(1, 1000):
        print(step, flush=True)
        stage_log.note_step(step=step, steps=999, loss=1.0, tokens_per_second=None, seconds_left=None)
        time.sleep(0.01)
"""


def test_after_a_kill_the_log_is_whole_and_free(log):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(log)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while "step" not in stage_log.state(log) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stage_log.is_held(log)
    process.kill()
    process.wait()
    assert not stage_log.is_held(log)
    _, *lines = log.read_text().splitlines()
    assert lines == [str(step) for step in range(1, len(lines) + 1)] and log.read_text().endswith("\n")
    assert stage_log.state(log)["step"] >= 1 and "exit_code" not in stage_log.state(log)
