"""How long is left: from the same stages' seconds, and silent where one of them is unknown."""

import dataclasses

import pytest

from smolpost import recipe
from smolpost.files import write_json
from smolpost.pipeline import manifest
from smolpost.pipeline.estimate import STARTING, as_stored, seconds_after, seconds_left
from smolpost.pipeline.lineage import Lineage

WORDS = ["pipeline=gsm8k", "data=gsm8k_folder", "stages.apo.seeds=[42,43]", "evaluation=none"]


@pytest.fixture
def lineage(words):
    return Lineage(recipe.load([*words, *WORDS]))


@pytest.fixture
def words(tmp_path):
    row = '{"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]}\n'
    pair = row.replace("messages", "chosen")[:-2] + ', "rejected": ' + row.partition(": ")[2]
    for name, text in (("mid", row), ("sft", row), ("preference", pair)):
        (tmp_path / f"smoltalk2_{name}.jsonl").write_text(text)
    return [f"data_root={tmp_path}", f"run_dir={tmp_path}/runs"]


def finish(stage, key, seconds, measuring=0.0, **config):
    """Leave what a finished run of the stage leaves, under another key."""
    name, seed = stage.name, stage.seed
    folder = stage.folder.with_name(f"{name}-{key}")
    folder.mkdir(parents=True)
    settings = as_stored(stage) | config
    manifest.write(folder, stage=name, key=key, seed=seed, seconds=seconds, config=settings)
    for task in ("recall", "answer") if measuring else ():
        measured = folder.parent / "evaluations" / folder.name / f"{task}-0"
        measured.mkdir(parents=True)
        write_json(measured / "scores.json", {"seconds": measuring / 2})


def left(lineage, *names, finished=(), elapsed=0.0, word="run"):
    return seconds_left([(lineage.stages[name], word) for name in names], set(finished), elapsed)


def test_earlier_runs_of_the_same_stages_are_the_basis(lineage):
    assert left(lineage, "mid", "sft") is None
    finish(lineage.stages["mid"], "a", 100.0, measuring=20.0)
    assert left(lineage, "mid") == 120 + 3 * STARTING  # prepare, train and eval
    assert left(lineage, "mid", "sft") is None  # of sft nothing is known
    assert left(lineage, "mid", word="evaluate") == 20 + STARTING
    finish(lineage.stages["sft"], "a", 60.0)
    assert left(lineage, "mid", "sft") == 180 + 5 * STARTING
    finish(lineage.stages["sft"], "b", 6.0, max_steps=3)  # a trial with less to do is no basis
    assert left(lineage, "mid", "sft") == 180 + 5 * STARTING
    finish(lineage.stages["sft"], "c", 70.0, learning_rate=9.0)
    assert left(lineage, "mid", "sft") == 190 + 5 * STARTING


def test_another_seed_is_a_basis_and_the_pace_of_this_run_counts(lineage):
    finish(lineage.stages["apo-42"], "a", 30.0)
    assert left(lineage, "apo-42", "apo-43") == 60 + 4 * STARTING
    # apo-42 took twice as long this time, and so will apo-43.
    twice = 2 * (30 + 2 * STARTING)
    assert left(lineage, "apo-42", "apo-43", finished=["apo-42"], elapsed=twice) == twice
    assert left(lineage, "apo-42", "apo-43", finished=["apo-42", "apo-43"], elapsed=90.0) is None


def test_what_follows_a_stage_is_its_own_evaluation_and_the_other_stages(lineage):
    mid, sft = lineage.stages["mid"], lineage.stages["sft"]
    todo = [(mid, "run"), (sft, "run")]
    assert seconds_after(sft, todo, {"mid"}, 1.0) == 0.0  # without evaluation the last stage is the end
    assert seconds_after(mid, todo, set(), 0.0) is None  # of sft nothing is known
    finish(sft, "a", 60.0)
    assert seconds_after(mid, todo, set(), 0.0) == 60 + 2 * STARTING
    measured = dataclasses.replace(mid, measuring=("smolpost", "eval"))
    assert seconds_after(measured, todo, set(), 0.0) is None
    finish(mid, "a", 100.0, measuring=20.0)
    assert seconds_after(measured, todo, set(), 0.0) == 60 + 2 * STARTING + 20 + STARTING


def test_other_stages_of_a_similar_name_are_none(lineage):
    finish(lineage.stages["sft"], "a", 60.0)
    (folder,) = lineage.root.glob("sft-a")
    folder.rename(folder.with_name("apo-42-x"))
    assert left(lineage, "apo-42") is None
