"""A training that was cut goes on under any backend and number of ranks, and ends as if it had never been cut."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import ROOT
from test_launch import SLOW, assert_same

from smolpost.pipeline import manifest
from smolpost.training.checkpoints import WHOLE

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


def goes_on(cut, single, tmp_path, stage, first, then):
    small = cut(stage, *first).copy(tmp_path)
    small.words = cut(stage, *first).words[:-1] + [f"run_dir={tmp_path / 'runs'}"]
    done = train(small, stage, *then)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(small, single, stage)
    report = manifest.read(small.folder_of(stage))["report"]
    assert report["resumed_from"] == f"checkpoint-{STEPS[stage]}"
    return done


# Each backend to each, and from two ranks to one and from one to two.
PAIRS = [
    ((old, ranks), (new, 3 - ranks))
    for old, new in itertools.product(("ddp", "fsdp2", "zero2", "zero3"), repeat=2)
    for ranks in (1, 2)
]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "apo"])
@pytest.mark.parametrize(("first", "then"), PAIRS, ids=lambda place: "-".join(map(str, place)))
def test_goes_on_elsewhere(cut, single, tmp_path, stage, first, then):
    done = goes_on(cut, single, tmp_path, stage, first, then)
    ranks = {1: "1 rank", 2: "2 ranks"}
    told = f", saved under {first[0]} on {ranks[first[1]]}, going on under {then[0]} on {ranks[then[1]]}"
    assert told.replace("ddp on 1", "single on 1") in done.stdout.replace("ddp on 1", "single on 1")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "apo"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: "-".join(map(str, place)))
def test_goes_on_in_place(cut, single, tmp_path, stage, place):
    done = goes_on(cut, single, tmp_path, stage, place, place)
    assert "saved under" not in done.stdout
