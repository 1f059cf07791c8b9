"""SIGTERM, SIGHUP and ctrl-C for `smolpost run` alone, as schedulers send them: real processes, real signals."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from smolpost.pipeline import manifest
from tests.small import ROOT, Small, environment

WORDS = ["stages.sft.max_steps=60", "stages.sft.save_steps=1000"]  # no checkpoint is due before the end


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The stage, trained without an interruption."""
    small = Small(tmp_path_factory.mktemp("whole"))
    small.write_data()
    small.words += WORDS
    done = small.smolpost("run", "stage=sft")
    assert done.returncode == 0, done.stderr[-3000:]
    return small


@pytest.fixture(scope="module")
def cut(whole, tmp_path_factory):
    """The same stage, still to be trained."""
    return untrained(whole, tmp_path_factory.mktemp("cut"))


def untrained(whole, folder):
    small = whole.copy(folder)
    small.words += WORDS
    shutil.rmtree(small.folder_of("sft"))
    return small


class Run:
    """`smolpost run` in the background, and what it has printed."""

    def __init__(self, small, log: Path, *more: str, command: list[str] | None = None):
        self.small, self.log, self.more = small, log, more
        command = command or [sys.executable, "-m", "smolpost.cli", "run", *small.words, *more, "stage=sft"]
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def until(self, text: str) -> None:
        deadline = time.monotonic() + 240  # DeepSpeed may have to build its kernels
        while text not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.005)

    def processes(self, program: str = "") -> list[psutil.Process]:
        """All that work in this run's folder, whatever their parents and groups."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if f"run_dir={self.small.folder / 'runs'}" in words and any(program in word for word in words):
                found.append(process)
        return found

    def ends(self, code: int) -> list[str]:
        """Waits for it; nothing of it is alive, nothing is finished, and no traceback is printed. Its own lines."""
        assert self.process.wait(timeout=60) == code
        assert [p for p in self.processes() if p.info["status"] != psutil.STATUS_ZOMBIE] == []
        assert manifest.read(self.small.folder_of("sft", *self.more)) is None
        output = self.log.read_text()
        assert "Traceback" not in output
        return re.findall("smolpost: .*", output)  # behind the bar of a process that was killed

    def stopped_at(self, name: str) -> int:
        """The step in its one line, of which there is a whole checkpoint."""
        [line] = self.ends({"SIGTERM": 143, "SIGHUP": 129, "ctrl-C": 130}[name])
        told = re.fullmatch(
            f"smolpost: stopped by {name} in stage sft at step (\\d+); the same command continues here", line
        )
        folder = self.small.folder_of("sft", *self.more)
        newest = max(int(mark.parent.name.removeprefix("checkpoint-")) for mark in folder.glob("checkpoint-*/whole"))
        assert newest == int(told[1]) < 60
        return newest


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "ctrl-C"])
def test_a_signal_to_run_alone_saves_after_the_step(cut, tmp_path, name):
    run = Run(cut, tmp_path / "log")
    run.until("/60 ")  # a line of the training's log
    os.kill(run.process.pid, {"ctrl-C": signal.SIGINT}.get(name) or getattr(signal, name))
    run.stopped_at(name)


def test_what_signals_cut_ends_as_if_they_had_not(whole, cut):
    """After the signals above, or alone, it goes on to the same weights, bit for bit."""
    done = cut.smolpost("run", "stage=sft")
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = cut.weights("sft"), whole.weights("sft")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    report, wanted = (manifest.read(small.folder_of("sft"))["report"] for small in (cut, whole))
    assert report["steps"] == wanted["steps"] == 60
    assert [e["loss"] for e in cut.log("sft")] == [e["loss"] for e in whole.log("sft")]


def test_ctrl_c_while_the_launcher_starts(whole, tmp_path):
    """A terminal sends it to the whole group; the launcher's imports take seconds in which there is no rank yet."""
    run = Run(untrained(whole, tmp_path), tmp_path / "log")
    run.until("$ accelerate launch")
    os.killpg(run.process.pid, signal.SIGINT)
    [line] = run.ends(130)
    assert re.fullmatch("smolpost: stopped by ctrl-C( in stage sft)?; the same command continues here", line)


def test_a_second_signal_kills_what_does_not_end(whole, tmp_path):
    run = Run(untrained(whole, tmp_path), tmp_path / "log")
    run.until("/60 ")  # a line of the training's log
    [training] = psutil.Process(run.process.pid).children()
    training.suspend()
    os.kill(run.process.pid, signal.SIGTERM)
    time.sleep(2.5)
    assert run.process.poll() is None
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.ends(143) == ["smolpost: stopped by SIGTERM in stage sft; the same command continues here"]


@pytest.mark.slow
def test_a_terminal_that_is_closed(whole, tmp_path):
    """The kernel sends SIGHUP, and every line that is printed from then on is an error."""
    small = untrained(whole, tmp_path)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        words = [sys.executable, "-m", "smolpost.cli", "run", *small.words, "stage=sft"]
        os.execve(sys.executable, words, environment())
    seen = b""
    while not re.search(rb"/60 [^\n]*\n", seen):  # not in the middle of a line, whose rest would be an error at once
        seen += os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    [mark] = small.folder_of("sft").glob("checkpoint-*/whole")
    assert 0 < int(mark.parent.name.removeprefix("checkpoint-")) < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "ctrl-C"])
@pytest.mark.parametrize("config", ["ddp", "zero2"])
def test_ranks_stop_at_the_same_step(whole, tmp_path, config, name):
    small, words = untrained(whole, tmp_path), (f"accelerate={config}", "accelerate.num_processes=2")
    run = Run(small, tmp_path / "log", *words)
    run.until("/60 ")  # a line of the training's log
    os.kill(run.process.pid, {"ctrl-C": signal.SIGINT}.get(name) or getattr(signal, name))
    run.stopped_at(name)
    done = small.smolpost("run", "stage=sft", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert manifest.read(small.folder_of("sft", *words))["report"]["num_processes"] == 2
    expected = whole.weights("sft")
    for key, tensor in small.weights("sft", *words).items():
        torch.testing.assert_close(tensor, expected[key], atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "num_ranks"), [("single", 1), ("ddp", 2)])
def test_ranks_of_a_pasted_launch_stop_at_their_own_signal(whole, tmp_path, config, num_ranks):
    """accelerate's own launcher passes nothing on, but schedulers signal the ranks too: one of them is enough."""
    small = untrained(whole, tmp_path)
    run = Run(small, tmp_path / "log", command=small.launch_command("sft", config, num_ranks))
    run.until("/60 ")  # a line of the training's log
    ranks = [p for p in run.processes("smolpost.train") if not any("accelerate" in word for word in p.cmdline())]
    assert len(ranks) == num_ranks
    ranks[-1].terminate()
    psutil.wait_procs(ranks, timeout=30)
    run.process.wait(timeout=30)
    assert [p for p in run.processes() if p.info["status"] != psutil.STATUS_ZOMBIE] == []
    output = run.log.read_text()
    [told] = re.findall(r"smolpost: stopped by SIGTERM at step (\d+); the same command continues here", output)
    assert (small.folder_of("sft") / f"checkpoint-{told}" / "whole").exists()
    assert "smolpost/train" not in output.partition("smolpost: stopped")[2]  # the tracebacks are accelerate's
