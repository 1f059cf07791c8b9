"""A training that was cut goes on under any backend and number of ranks, and ends as if it had never been cut."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch

from smolpost.pipeline import manifest
from smolpost.training.checkpoints import WHOLE, last_whole
from tests.small import PROGRAM, ROOT, environment
from tests.training.test_launch import assert_same

PLACES = [(backend, ranks) for backend in ("ddp", "fsdp2", "zero2", "zero3") for ranks in (1, 2)]
STEPS = {"sft": 6, "apo": 2}  # after which the first try is killed
SAVING = ("stages.apo.save_steps=1",)  # does not change the key


def train(small, stage, backend, ranks, program=None, **variables):
    if backend == "fsdp2":
        program = program or "fsdp_on_cpu.py"
        variables |= {"ACCELERATE_TORCH_DEVICE": "cpu"}
    chosen = {"program": (str(ROOT / "tests/training" / program),)} if program else {}
    return small.launch(stage, backend, ranks, *SAVING, **chosen, **variables)


@pytest.fixture(scope="module")
def cut(started, tmp_path_factory):
    """(stage, backend, ranks) -> the toy pipeline whose training was killed there; made once each."""
    made = {}

    def cut_once(stage, backend, ranks):
        place = stage, backend, ranks
        if place not in made:
            small = started.copy(tmp_path_factory.mktemp(f"{stage}-{backend}-{ranks}"))
            done = train(small, stage, backend, ranks, program="cut_short.py", CUT_AFTER=str(STEPS[stage]))
            folder = small.folder_of(stage)
            assert done.returncode != 0 and not (folder / "manifest.json").exists()
            assert (folder / f"checkpoint-{STEPS[stage]}" / WHOLE).exists(), done.stderr[-3000:]
            made[place] = small
        return made[place]

    return cut_once


def twin(small, folder):
    """A copy of a copy, which reads the data of the first."""
    copied = small.copy(folder)
    copied.words = [*small.words[:-1], f"run_dir={folder / 'runs'}"]
    return copied


def goes_on(cut, single, tmp_path, stage, first, then):
    small = twin(cut(stage, *first), tmp_path)
    done = train(small, stage, *then)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(small, single, stage)
    report = manifest.read(small.folder_of(stage))["report"]
    assert report["resumed_from"] == f"checkpoint-{STEPS[stage]}"
    return done


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped": (flip_a_byte, "the content of state-00000-00000.safetensors is not what was written"),
    "truncated": (
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        r"state-00000-00000.safetensors has [\d,]+ bytes, not [\d,]+",
    ),
    "missing": (lambda file: file.unlink(), "state-00000-00000.safetensors is missing"),
    "mark": (
        lambda file: (file.parent / WHOLE).write_text('{"files"'),
        "whole is not a list of files with their hashes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(cut, tmp_path, capsys, damage):
    small = cut("sft", "single", 1)
    shutil.copytree(small.folder_of("sft"), folder := tmp_path / "sft")
    spoil, reason = DAMAGES[damage]
    assert last_whole(folder)[0].name == "checkpoint-6"
    spoil(folder / "checkpoint-6" / "state-00000-00000.safetensors")
    (folder / "checkpoint-5").mkdir()
    assert last_whole(folder)[0].name == "checkpoint-4"
    printed = capsys.readouterr().out
    assert f"{folder}/checkpoint-5 was cut short while saving; removed\n" in printed
    expected = (
        rf"{folder}/checkpoint-6 is damaged \({reason}\); it is removed, and training continues from the previous one\n"
    )
    assert re.search(expected, printed)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4"]


def test_training_goes_on_from_the_one_before_bit_for_bit(cut, single, tmp_path):
    small = twin(cut("sft", "single", 1), tmp_path)
    flip_a_byte(small.folder_of("sft") / "checkpoint-6" / "state-00000-00000.safetensors")
    done = train(small, "sft", "single", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-6 is damaged" in done.stdout and "checkpoint-4\n" in done.stdout
    assert manifest.read(small.folder_of("sft"))["report"]["resumed_from"] == "checkpoint-4"
    expected = single.weights("sft")
    for name, tensor in small.weights("sft").items():
        assert torch.equal(tensor, expected[name])


def test_nothing_in_a_checkpoint_is_a_pickle(cut):
    folder = cut("sft", "single", 1).folder_of("sft") / "checkpoint-6"
    mark = json.loads((folder / WHOLE).read_text())
    assert (mark["backend"], mark["num_ranks"]) == ("single", 1)
    assert {file.name for file in folder.iterdir()} == {*mark["files"], WHOLE}
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json", ""}


# Each backend to each, and from two ranks to one and from one to two.
PAIRS = [
    ((old, ranks), (new, 3 - ranks))
    for old, new in itertools.product(("ddp", "fsdp2", "zero2", "zero3"), repeat=2)
    for ranks in (1, 2)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "first", "then"),
    [("sft", *pair) for pair in PAIRS] + [("apo", *pair) for pair in PAIRS if pair[0][1] == 2],
    ids=lambda place: place if isinstance(place, str) else "-".join(map(str, place)),
)
def test_goes_on_elsewhere(cut, single, tmp_path, stage, first, then):
    done = goes_on(cut, single, tmp_path, stage, first, then)
    ranks = {1: "1 rank", 2: "2 ranks"}
    told = f", saved under {first[0]} on {ranks[first[1]]}, going on under {then[0]} on {ranks[then[1]]}"
    assert told in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "apo"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: "-".join(map(str, place)))
def test_goes_on_in_place(cut, single, tmp_path, stage, place):
    done = goes_on(cut, single, tmp_path, stage, place, place)
    assert "saved under" not in done.stdout


ADAPTERS = ("stages.sft.lora.r=2",)  # none of their parameters is without weight decay, so one group is empty


@pytest.mark.slow
def test_adapters_go_on_elsewhere(started, tmp_path):
    """One process to ZeRO-3 and back; the frozen weights are the start checkpoint's."""
    whole, cut = started.copy(tmp_path / "whole"), started.copy(tmp_path / "cut")
    assert whole.launch("sft", "single", 1, *ADAPTERS).returncode == 0
    program = (str(ROOT / "tests/training/cut_short.py"),)
    for backend, ranks, step in (("single", 1, "4"), ("zero3", 2, "8")):
        cut.launch("sft", backend, ranks, *ADAPTERS, program=program, CUT_AFTER=step)
        assert (cut.folder_of("sft", *ADAPTERS) / f"checkpoint-{step}" / WHOLE).exists()
    done = cut.launch("sft", "single", 1, *ADAPTERS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(cut, whole, "sft", *ADAPTERS, words=ADAPTERS)


LONG = ("stages.sft.max_steps=60",)
CROWD = [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)]


@pytest.fixture(scope="module")
def uncut(started, tmp_path_factory):
    """60 steps in one go."""
    small = started.copy(tmp_path_factory.mktemp("uncut"))
    done = small.launch("sft", "single", 1, *LONG)
    assert done.returncode == 0, done.stderr[-3000:]
    return small


@pytest.mark.slow
@pytest.mark.parametrize("place", CROWD, ids=lambda place: "-".join(map(str, place)))
def test_killed_three_times_at_any_moment(started, uncut, tmp_path, place):
    """kill -9 of all processes at random moments after the first step, also while a checkpoint is written."""
    backend, ranks = place
    small, draw = started.copy(tmp_path), random.Random(f"{place}")
    folder = small.folder_of("sft", *LONG)
    program, variables = PROGRAM, {}
    if backend == "fsdp2":
        program = (str(ROOT / "tests/training/fsdp_on_cpu.py"),)
        variables = {"ACCELERATE_TORCH_DEVICE": "cpu"}
    command = small.launch_command("sft", backend, ranks, *LONG, program=program)
    for _ in range(3):
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment() | variables, start_new_session=True, stdout=log, stderr=log
            )
        before, deadline = set(folder.glob("checkpoint-*")), time.monotonic() + 120
        while not set(folder.glob("checkpoint-*")) - before:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = small.launch("sft", backend, ranks, *LONG, program=program, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(small, uncut, "sft", *LONG, words=LONG)
    if place == ("single", 1):
        for name, tensor in small.weights("sft", *LONG).items():
            assert torch.equal(tensor, uncut.weights("sft", *LONG)[name])
