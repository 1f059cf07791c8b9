"""`smolpost run` under ctrl-C, and a training process that outlives its killed parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import ROOT, Small, environment

from smolpost.pipeline import manifest

LONGER = ["stages.sft.max_steps=400", "stages.sft.save_steps=20"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    small = Small(tmp_path_factory.mktemp("run"))
    small.write_data()
    small.words += LONGER
    return small


def start(project):
    return subprocess.Popen(
        [sys.executable, "-m", "smolpost.cli", "run", *project.words, "stage=sft"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
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


def test_ctrl_c_stops_everything_and_the_same_command_continues(project):
    folder = project.folder_of("sft")
    process = start(project)
    wait_for(lambda: list(folder.glob("checkpoint-*/whole")), process)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "smolpost: stopped; the same command continues here" in error
    deadline = time.monotonic() + 20
    while alive(process.pid):  # nobody of the group is left
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert manifest.read(folder) is None


def test_an_orphan_is_waited_for_not_raced(project):
    """kill -9 of `run` alone leaves its training process alive; the next run waits for it and takes its result."""
    folder = project.folder_of("sft")
    first = start(project)
    before = set(folder.glob("checkpoint-*/whole"))
    wait_for(lambda: set(folder.glob("checkpoint-*/whole")) - before, first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = start(project)
    output, error = second.communicate(timeout=180)
    assert second.returncode == 0, error[-2000:]
    assert "sft: resume (at step" in output
    assert "waiting for process" in output and f"{folder} is finished" in output
    assert manifest.read(folder)["report"]["steps"] == 400
