"""`smolpost run` under a terminal's ctrl-C, and a training process that outlives its killed parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smolpost.pipeline import manifest
from tests.small import ROOT, Small, environment

LONGER = ["stages.sft.max_steps=400", "stages.sft.save_steps=20"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    small = Small(tmp_path_factory.mktemp("run"))
    small.write_data()
    small.words += LONGER
    return small


def start(project, log: Path):
    """The run in a group of its own. It writes to a file: nobody would read the pipe of an orphan."""
    with open(log, "w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "smolpost.cli", "run", *project.words, "stage=sft"],
            cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def wait_for(condition, process):
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def alive(group):
    """Process ids of the group, those apart that only wait to be reaped."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = stat.read_text().partition(" (")
        except OSError:
            continue
        state, _, pgrp = rest.rpartition(") ")[2].split()[:3]
        if int(pgrp) == group and state != "Z":
            found.append(int(pid))
    return found


def test_ctrl_c_stops_everything_and_the_same_command_continues(project, tmp_path):
    folder = project.folder_of("sft")
    process = start(project, tmp_path / "log")
    wait_for(lambda: list(folder.glob("checkpoint-*/whole")), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    output = (tmp_path / "log").read_text()
    assert output.count("smolpost: stopped by ctrl-C in stage sft at step ") == 1 and "Traceback" not in output
    deadline = time.monotonic() + 20
    while alive(process.pid):  # nobody of the group is left
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert manifest.read(folder) is None


def test_an_orphan_is_waited_for_not_raced(project, tmp_path):
    """kill -9 of `run` alone leaves its training process alive; the next run waits for it and takes its result."""
    folder = project.folder_of("sft")
    before = set(folder.glob("checkpoint-*/whole"))
    first = start(project, tmp_path / "first")
    wait_for(lambda: set(folder.glob("checkpoint-*/whole")) - before, first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = start(project, tmp_path / "second")
    assert second.wait(timeout=180) == 0, (tmp_path / "second").read_text()[-2000:]
    output = (tmp_path / "second").read_text()
    assert "sft: resume (at step" in output
    assert "waiting for process" in output and f"{folder} is finished" in output
    assert manifest.read(folder)["report"]["steps"] == 400


def test_settings_of_an_evaluation_are_refused_before_anything_is_made(tmp_path):
    small = Small(tmp_path)
    small.write_data()
    done = small.smolpost("run", "evaluation=gsm8k", "evaluation.tasks.ruler.lengths=[]")
    assert done.returncode == 2 and "evaluation.tasks.ruler.lengths=[] is empty" in done.stderr
    assert not (tmp_path / "runs").exists()
