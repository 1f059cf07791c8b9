"""The same stage on one process, on two ranks, interrupted, and in other micro-batches: the same result."""

import os
import signal
import subprocess
import time

import pytest
import torch
from small import ROOT, environment

from smolpost.pipeline import manifest

WEIGHTS = {"atol": 2e-5, "rtol": 0}  # FACTS section 4: 2 processes against 1


def assert_same(found, expected, stage, *more):
    logs, reference = found.log(stage, *more), expected.log(stage)
    assert len(logs) == len(reference) > 0
    for entry, wanted in zip(logs, reference, strict=True):
        for key in ("loss", "grad_norm"):
            torch.testing.assert_close(torch.tensor(entry[key]), torch.tensor(wanted[key]), atol=1e-5, rtol=1e-5)
    weights, wanted = found.weights(stage, *more), expected.weights(stage)
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, **WEIGHTS, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("stage", ["sft", "apo"])
@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_two_ranks_match_one_process(started, single, tmp_path, stage, config):
    two = started.copy(tmp_path)
    done = two.launch(stage, config, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert manifest.read(two.folder_of(stage))["report"]["num_processes"] == 2
    assert_same(two, single, stage)


def test_training_moves_the_weights(started, single):
    """The comparisons above would hold for a trainer that does nothing."""
    start, trained = started.weights("init"), single.weights("sft")
    moved = max((trained[name] - tensor).abs().max().item() for name, tensor in start.items())
    assert moved > 1e-3
    losses = [entry["loss"] for entry in single.log("sft")]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_micro_batches_do_not_matter(started, single, tmp_path, stage):
    other = started.copy(tmp_path)
    words = [f"stages.{stage}.micro_batch_size=4"]
    done = other.launch(stage, "single", 1, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(other, single, stage, *words)


def test_killed_training_goes_on_and_ends_the_same(started, single, tmp_path):
    """kill -9 of the whole process group once a checkpoint is whole; the same command continues from it."""
    cut = started.copy(tmp_path)
    process = subprocess.Popen(
        cut.launch_command("sft", "single", 1),
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    folder = cut.folder_of("sft")
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-2" / "whole").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "manifest.json").exists()
    # A checkpoint that was cut short while saving is no checkpoint.
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "trainer_state.json").write_text("{}")
    done = cut.launch("sft", "single", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-5 was cut short while saving; removed" in done.stdout
    assert "resuming from" in done.stdout
    assert manifest.read(folder)["report"]["resumed_from"] in {f"checkpoint-{step}" for step in range(2, 12, 2)}
    assert_same(cut, single, "sft")
    assert not list(folder.glob("checkpoint-*"))


def test_finished_stage_is_not_trained_again(single):
    before = manifest.read(single.folder_of("sft"))["finished"]
    done = single.launch("sft", "single", 1)
    assert done.returncode == 0 and "is finished" in done.stdout
    assert manifest.read(single.folder_of("sft"))["finished"] == before


def test_launch_refuses_in_one_line(started, tmp_path):
    other = started.copy(tmp_path)
    done = other.launch("sft", "ddp", 2, "stages.sft.global_batch_size=5")
    lines = [line for line in done.stderr.splitlines() if line.startswith("smolpost:")]
    assert lines == [
        "smolpost: stages.sft.global_batch_size=5 is not a multiple of micro_batch_size x num_processes = 1 x 2; try 4"
    ]
    assert done.returncode != 0
    assert not (other.folder_of("sft", "stages.sft.global_batch_size=5") / "manifest.json").exists()
