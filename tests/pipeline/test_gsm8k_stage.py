"""The pipeline gsm8k from nothing but the public file, as a user outside runs it."""

import json
import shutil

import pytest

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.pipeline.lineage import Lineage
from tests.small import ROOT, SMALL, Small

FILE = ROOT / "tests" / "word_problems.jsonl"


def public(folder, *more: str) -> list[str]:
    words = [word for word in SMALL if not word.startswith("data=")]
    return [*words, f"data.problems.sources.gsm8k.path={folder / 'train.jsonl'}", f"run_dir={folder / 'runs'}", *more]


@pytest.fixture
def folder(tmp_path):
    shutil.copy(FILE, tmp_path / "train.jsonl")
    return tmp_path


def test_the_stage_comes_with_the_data():
    found = recipe.load(["pipeline=gsm8k"]).recipe
    assert (found.data["problems"].sources["gsm8k"].path, found.stages["gsm8k"].kind) == ("openai/gsm8k", "gsm8k")
    assert "gsm8k" not in recipe.load(["pipeline=gsm8k", "data=gsm8k_folder", "data_root=x"]).recipe.stages
    other = recipe.load(["pipeline=smollm3_from_release", "data=gsm8k"]).recipe
    assert other.data["sft"].sources["gsm8k"].stage == "gsm8k" and "gsm8k" in other.stages


def test_its_key_is_the_files_content_and_not_its_place(folder, tmp_path):
    def key(*words):
        return Lineage(recipe.load(public(folder, *words))).stages["gsm8k"].key

    first = key()
    (tmp_path / "other").mkdir()
    shutil.copy(FILE, tmp_path / "other" / "p.jsonl")
    assert key(f"data.problems.sources.gsm8k.path={tmp_path / 'other' / 'p.jsonl'}") == first
    assert key("stages.gsm8k.heldout=0.2") != first != key("data.problems.seed=1")
    with open(folder / "train.jsonl", "a") as file:
        file.write(json.dumps({"question": "One more?", "answer": "It is 1.\n#### 1"}) + "\n")
    assert key() != first


@pytest.mark.parametrize(
    "words, text",
    [
        (
            ["data.problems.sources.gsm8k.columns=alpaca"],
            "data.problems.sources.gsm8k.columns=alpaca, but stages.gsm8k",
        ),
        (["stages.gsm8k.sft=0.95"], "stages.gsm8k.sft=0.95 and preference=0.1 leave nothing for mid; lower one"),
        (
            ["stages.gsm8k.preference=0"],
            "stages.gsm8k.preference=0 writes no pairs, but stages.init reads smoltalk2_preference.jsonl; raise it, or",
        ),
        (["stages.gsm8k.problems=none"], "stages.gsm8k.problems=none is not a mixture under data"),
        (["stages.gsm8k.heldout=0"], "stages.gsm8k.heldout=0 is outside (0, 1)"),
    ],
)
def test_settings_that_cannot_be_meant(words, text):
    with pytest.raises(UserError) as refused:
        recipe.load(["pipeline=gsm8k", *words])
    assert text in str(refused.value)


def test_without_pairs_the_other_stages_stay():
    words = ["stages.gsm8k.preference=0", "stages.init.tokenizer_data=[mid,sft]", "~stages.apo", "~stages.soup"]
    assert "apo" not in recipe.load(["pipeline=gsm8k", *words, "~stages.merge", "evaluation=none"]).recipe.stages


@pytest.mark.slow
def test_from_the_public_file_to_an_apo_checkpoint(folder):
    small = Small(folder)
    small.words = public(folder, "stages.sft.max_steps=2", "stages.apo.max_steps=1")
    done = small.smolpost("run", "stage=apo")
    assert done.returncode == 0, done.stderr
    assert "30 problems as rows: mid 16, sft 10, heldout 1, preference 2, heldout_pairs 1" in done.stdout
    assert (small.folder_of("apo") / "model.safetensors").is_file()
    again = small.smolpost("run", "stage=apo")
    assert again.returncode == 0 and "30 problems" not in again.stdout


def test_a_broken_row_is_named_and_nothing_is_written(folder):
    with open(folder / "train.jsonl", "a") as file:
        file.write(json.dumps({"question": "One more?", "answer": "It is 1."}) + "\n")
    small = Small(folder)
    small.words = public(folder)
    done = small.smolpost("run", "stage=gsm8k")
    assert done.returncode == 2 and not list((folder / "runs").glob("gsm8k/gsm8k-*/*.jsonl"))
    assert f"{folder}/train.jsonl:31: answer='It is 1.' does not end in a line `#### NUMBER`" in done.stderr
