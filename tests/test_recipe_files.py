# ruff: noqa: E501 - whole lines are compared
"""Recipes of one's own: where they are found, and what a mistake in a YAML file says."""

from pathlib import Path

import pytest

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.recipe import room

def keys(kind: type) -> str:
    return ", ".join(sorted(field.name for field in dataclasses.fields(kind)))


HEAD = "# @package _global_\n"
DEFAULTS = """defaults:
  - /model: tiny
  - /data: tiny
  - /evaluation: none
  - /accelerate: single
  - /stage@stages.tasks: tasks
  - /stage@stages.init: init
  - /stage@stages.mid: mid
  - /stage@stages.sft: sft
  - _self_
"""
TINY = HEAD + "defaults:\n  - /pipeline/tiny\n  - _self_\n"


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as error:
        recipe.load(list(words))
    return str(error.value)


# What the pipeline file mine.yaml holds, or files beside it -> the line.
MISTAKES = {
    "key": (TINY + "stages: {sft: {lerning_rate: 1e-3}}", ""),
    "key of a nested node": (TINY + "stages: {sft: {lora: {rank: 4}}}", ""),
    "key of a source": (TINY + "data: {sft: {sources: {a: {pth: x.jsonl}}}}", ""),
    "key of a task": (TINY + "evaluation: {tasks: {answer: {max_row: 3}}}", ""),
    "key of the root": (TINY + "run_dri: x", ""),
    "stage": (TINY + "stages: {stf: {seeds: [1]}}", ""),
    "stage kind": (TINY + "stages: {more: {kind: ppo}}", ""),
    "another kind": (TINY + "stages: {sft: {kind: apo}}", ""),
    "number": (TINY + "stages: {sft: {learning_rate: fast}}", ""),
    "whole number": (TINY + "stages: {sft: {lora: {r: abc}}}", ""),
    "fraction": (TINY + "model: {architecture: {hidden_size: 1.5}}", ""),
    "bool": (TINY + "stages: {sft: {gradient_checkpointing: maybe}}", ""),
    "null": (TINY + "stages: {sft: {max_seq_len: null}}", ""),
    "null for a list": (TINY + "stages: {sft: {seeds: null}}", ""),
    "a number for a list": (TINY + "stages: {sft: {seeds: 42}}", ""),
    "a list for a number": (TINY + "stages: {sft: {max_seq_len: [1, 2]}}", ""),
    "item of a list": (TINY + "stages: {sft: {seeds: [a]}}", ""),
    "text for a node": (TINY + "stages: {sft: {lora: yes please}}", ""),
    "text for a stage": (TINY + "stages: {sft: fast}", ""),
    "list for a mixture": (TINY + "data: {sft: [a.jsonl]}", ""),
    "list for names": (TINY + "data: {sft: {sources: [a.jsonl]}}", ""),
    "choice": (TINY + "stages: {sft: {packing: ffd}}", ""),
    "interval": (TINY + "stages: {sft: {warmup_ratio: 3}}", ""),
    "nan": (TINY + "stages: {sft: {learning_rate: .nan}}", ""),
    "reference": (TINY + "stages: {sft: {data: stf}}", ""),
    "interpolation to nothing": (TINY + "stages: {sft: {max_steps: '${stepz}'}}", ""),
    "interpolation to another type": (TINY + "stages: {sft: {max_steps: '${run_dir}'}}", ""),
    "interpolation that does not end": (TINY + "stages: {sft: {today: '${run_dir'}}", ""),
    "environment": (TINY + "stages: {sft: {today: '${oc.env:NOT_SET_AT_ALL}'}}", ""),
    "no value": (HEAD + DEFAULTS + "stages: {more: {kind: sft, data: sft, init_from: mid}}", ""),
    "tab": (TINY + "stages:\n\tsft: {}\n", ""),
    "brackets": (TINY + "stages: {sft: {seeds: [1, 2}}\n", ""),
    "colon": (TINY + "run_dir: a: b\n", ""),
    "duplicate": (TINY + "seed: 1\nrun_dir: a\nseed: 2\n", ""),
    "empty": ("# nothing yet\n", ""),
    "list": ("- a\n- b\n", ""),
    "text": ("tiny\n", ""),
    "number alone": ("3\n", ""),
    "bytes": (b"run_dir: \xff\xfe\n", ""),
    "key of another type": (TINY + "1: x\n", ""),
    "no package line": (TINY.removeprefix(HEAD), ""),
    "defaults as a mapping": (HEAD + "defaults: {/model: tiny}\n", ""),
    "defaults with a number": (HEAD + "defaults:\n  - 3\n", ""),
    "defaults with two keys": (HEAD + "defaults:\n  - {/model: tiny, /data: tiny}\n", ""),
    "missing option": (HEAD + DEFAULTS.replace("/model: tiny", "/model: tinny"), ""),
    "missing group": (HEAD + DEFAULTS.replace("/model: tiny", "/modle: tiny"), ""),
    "missing config": (HEAD + DEFAULTS.replace("- /model: tiny", "- /model/tinny"), ""),
    "stage without a place": (HEAD + DEFAULTS.replace("/stage@stages.sft: sft", "/stage: sft"), ""),
    "no accelerate": (HEAD + DEFAULTS.replace("  - /accelerate: single\n", ""), ""),
    "override of what is not there": (HEAD + DEFAULTS.replace("/model: tiny", "override /model: tiny"), ""),
    "stage twice": (HEAD + DEFAULTS.replace("stages.mid: mid", "stages.sft: mid"), ""),
}


@pytest.mark.parametrize("case", MISTAKES, ids=list(MISTAKES))
def test_a_mistake_in_a_pipeline_file_is_one_line(here, case):
    content, line = MISTAKES[case]
    write(here, {"mine.yaml": content})
    assert refusal("pipeline=./mine.yaml") == line


# Files of a recipes folder, chosen by tiny's pipeline or one beside them -> the line.
FOLDER_MISTAKES = {
    "stage without its schema": (
        {"stage/mine.yaml": "learning_rate: 1e-3\n"}, ["+stage@stages.more=mine"],
        "",
    ),
    "schema of no kind": (
        {"stage/mine.yaml": "defaults:\n  - /schema/sfft@_here_\n  - _self_\nseeds: [1]\n"}, ["+stage@stages.more=mine"],
        "",
    ),
    "key in a stage file": (
        {"stage/sft.yaml": "defaults:\n  - /schema/sft@_here_\n  - _self_\nlerning_rate: 1\n"}, [],
        "",
    ),
    "base of a stage file": (
        {"stage/sft.yaml": "defaults:\n  - smt\n  - _self_\nseeds: [1]\n"}, [],
        "",
    ),
    "tab in a data file": ({"data/tiny.yaml": "sft:\n\tsources: {}\n"}, [], ""),
    "duplicate in a data file": ({"data/tiny.yaml": "sft: {}\nsft: {}\n"}, [], ""),
    "list in a data file": ({"data/tiny.yaml": "- a.jsonl\n"}, [], ""),
    "number in a data file": ({"data/tiny.yaml": "3\n"}, [], ""),
    "value in a data file": ({"data/mine.yaml": "sft: {sources: {a: {path: x, weight: lots}}}\n"}, ["data=mine"], ""),
    "weight in a data file": ({"data/mine.yaml": "sft: {sources: {a: {path: x, weight: 0}}}\n"}, ["data=mine"], ""),
    "key in a model file": ({"model/mine.yaml": "architecture: {hiden_size: 64}\n"}, ["model=mine"], ""),
    "key in a task": (
        {"evaluation/mine.yaml": "tasks: {loss: {kind: perplexity, rows: 3}}\n"}, ["evaluation=mine"], ""
    ),
    "processes": ({"accelerate/mine.yaml": "num_processes: '2'\n"}, ["accelerate=mine"], ""),
    "no pipeline of that name": ({"pipeline/mine.yaml": TINY}, ["pipeline=mne"], ""),
    "word for what a folder has": ({"pipeline/mine.yaml": TINY}, ["pipeline=mine", "stages.sft.lerning_rate=1"], ""),
    "word for a source": ({"pipeline/mine.yaml": TINY}, ["pipeline=mine", "data.sft.sources.task.path=x"], ""),
    "word for accelerate": ({"pipeline/mine.yaml": TINY}, ["pipeline=mine", "accelerate.num_proceses=2"], ""),
    "word for a task": ({"pipeline/mine.yaml": TINY}, ["pipeline=mine", "evaluation.tasks.anser.max_rows=2"], ""),
    "word for an input": ({"pipeline/mine.yaml": TINY}, ["pipeline=mine", "stages.merge.inputs.sop=2"], ""),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDER_MISTAKES, ids=list(FOLDER_MISTAKES))
def test_a_mistake_in_a_recipes_folder_is_one_line(here, case):
    files, words, line = FOLDER_MISTAKES[case]
    write(here / "own", files)
    assert refusal("--recipes=own", *words) == line


# ---------------------------------------------------------------- where recipes are found


def test_a_pipeline_file_starts_from_a_shipped_one(here):
    write(here, {"mine.yaml": TINY + "stages: {sft: {learning_rate: 5e-4}}\n", "tiny.yaml": TINY})
    found = recipe.load(["pipeline=./mine.yaml"])
    assert (found.recipe.pipeline, found.overrides) == ("tiny", ("pipeline=./mine.yaml",))
    shipped = recipe.load(["pipeline=tiny"]).recipe
    assert dataclasses.replace(found.recipe.stages["sft"], learning_rate=1e-3) == shipped.stages["sft"]
    # A file with the name of a shipped pipeline is the file.
    write(here, {"tiny.yaml": TINY + "pipeline: other\n"})
    assert recipe.load(["pipeline=tiny.yaml"]).recipe.pipeline == "other"
    assert recipe.load(["pipeline=tiny"]).recipe.pipeline == "tiny"


def test_a_pipeline_without_a_name_is_called_as_its_file(here):
    write(here, {"my plans/über.yaml": HEAD + DEFAULTS.replace("sft: sft", "sft: mine"), "my plans/stage/mine.yaml": MINE})
    found = recipe.load([f"pipeline={here}/my plans/über.yaml"])
    assert found.recipe.pipeline == "über"
    assert found.recipe.stages["sft"] == schema.SFTStage(
        init_from="mid", data="sft", max_seq_len=64, learning_rate=1e-3, global_batch_size=8, lora=schema.LoRA(r=4)
    )


MINE = "kind: sft\ninit_from: mid\ndata: sft\nmax_seq_len: 64\nlearning_rate: 1e-3\nglobal_batch_size: 8\nlora: {r: 4}\n"


def test_folders_are_searched_in_their_order_and_a_replaced_file_is_said(here):
    write(here / "a", {"model/tiny.yaml": "architecture: {hidden_size: 32}\n"})
    write(here / "b's", {"model/tiny.yaml": "architecture: {hidden_size: 16}\n", "accelerate/node.yaml": "num_processes: 2\n"})
    words = ["--recipes", "a", "--recipes=b's", "accelerate=node"]
    found = recipe.load(words)
    assert found.recipe.model.architecture.hidden_size == 32
    assert found.replaced == ("a/model/tiny.yaml replaces the library's model/tiny.yaml",)
    assert found.accelerate == Path("b's/accelerate/node.yaml")
    assert found.overrides == ("--recipes=a", "--recipes=b's", "accelerate=node")
    assert recipe.load(["pipeline=tiny"]).replaced == ()
    assert "did you mean stages.sft.learning_rate?" in refusal(*words, "stages.sft.lerning_rate=1")


@pytest.mark.parametrize("name", ["../../x", "..", "a/b", "/tmp/x", ".x", "a b"])
def test_a_pipeline_s_name_does_not_lead_out_of_run_dir(here, name):
    write(here, {"mine.yaml": TINY + f"pipeline: '{name}'\n"})
    assert refusal("pipeline=mine.yaml") == (
        f"mine.yaml: pipeline={name}, which becomes a folder or file; use letters, digits and _ . + - after the first"
    )


def test_a_sum_names_its_parts_and_who_wrote_them(here):
    write(here, {"mine.yaml": TINY + "stages: {merge: {inputs: {mid: 0.9}}}\n"})
    line = refusal("pipeline=mine.yaml", "stages.merge.inputs.long_context=0.2")
    assert "stages.merge.inputs sum to 2, and weights of a linear merge sum to 1: soup 0.9 (" in line
    assert line.partition("sum to 1: ")[2].startswith(
        f"soup 0.9 ({room('recipes')}/stage/merge.yaml), long_context 0.2 (the command line), mid 0.9 (mine.yaml); change"
    )
    assert line.endswith("or leave it out with ~stages.merge.inputs.mid")
    words = ["pipeline=mine.yaml", "~stages.merge.inputs.mid"]
    assert recipe.load(words).recipe.stages["merge"].inputs == {"soup": 0.9, "long_context": 0.1}
