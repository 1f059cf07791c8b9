# ruff: noqa: E501 - whole lines are compared
"""Recipes of one's own: where they are found, and what a mistake in a YAML file says."""

import dataclasses
from pathlib import Path

import pytest

from smolpost import recipe, schema
from smolpost.errors import UserError
from smolpost.evaluation.tasks.perplexity import PerplexityTask
from smolpost.evaluation.tasks.reasoning import ReasoningTask
from smolpost.recipe import room
from smolpost.registry import STAGE_KINDS
from smolpost.stages.sft import SFTStage
from smolpost.training.settings import LoRA


def keys(kind: type) -> str:
    return ", ".join(sorted(field.name for field in dataclasses.fields(kind)))


KINDS = ", ".join(STAGE_KINDS)
STAGES = ", ".join(sorted(file.stem for file in (room("recipes") / "stage").glob("*.yaml")))
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
    "key": (
        TINY + "stages: {sft: {lerning_rate: 1e-3}}",
        f"mine.yaml: stages.sft.lerning_rate is not a key of the recipe; did you mean stages.sft.learning_rate? keys of stages.sft: {keys(SFTStage)}",
    ),
    "key of a nested node": (
        TINY + "stages: {sft: {lora: {rank: 4}}}",
        f"mine.yaml: stages.sft.lora.rank is not a key of the recipe; keys of stages.sft.lora: {keys(LoRA)}",
    ),
    "key of a source": (
        TINY + "data: {sft: {sources: {a: {pth: x.jsonl}}}}",
        f"mine.yaml: data.sft.sources.a.pth is not a key of the recipe; did you mean data.sft.sources.a.path? keys of data.sft.sources.a: {keys(schema.Source)}",
    ),
    "key of a task": (
        TINY + "evaluation: {tasks: {answer: {max_row: 3}}}",
        f"mine.yaml: evaluation.tasks.answer.max_row is not a key of the recipe; did you mean evaluation.tasks.answer.max_rows? keys of evaluation.tasks.answer: {keys(ReasoningTask)}",
    ),
    "key of the root": (
        TINY + "run_dri: x",
        f"mine.yaml: run_dri is not a key of the recipe; did you mean run_dir? keys: {keys(schema.Recipe)}",
    ),
    "stage": (
        TINY + "stages: {stf: {seeds: [1]}}",
        "mine.yaml: stages.stf has no kind; did you mean stages.sft? a new stage states it, `kind: KIND` in its file or stages.stf.kind=KIND; choose one of: "
        + KINDS,
    ),
    "stage kind": (
        TINY + "stages: {more: {kind: ppo}}",
        "mine.yaml: stages.more.kind=ppo is not a stage kind; choose one of: " + KINDS,
    ),
    "another kind": (
        TINY + "stages: {sft: {kind: apo}}",
        "mine.yaml: stages.sft.kind=apo, but it was made as sft; give the new one a name of its own",
    ),
    "number": (
        TINY + "stages: {sft: {learning_rate: fast}}",
        "mine.yaml: stages.sft.learning_rate=fast is not a number",
    ),
    "whole number": (
        TINY + "stages: {sft: {lora: {r: abc}}}",
        "mine.yaml: stages.sft.lora.r=abc is not a whole number",
    ),
    "fraction": (
        TINY + "model: {architecture: {hidden_size: 1.5}}",
        "mine.yaml: model.architecture.hidden_size=1.5 is not a whole number",
    ),
    "bool": (
        TINY + "stages: {sft: {shuffle_packs: maybe}}",
        "mine.yaml: stages.sft.shuffle_packs=maybe is not true or false",
    ),
    "a field's old name": (
        TINY + "stages: {sft: {gradient_checkpointing: true}}",
        "mine.yaml: stages.sft.gradient_checkpointing=true is now called activation_checkpointing; write "
        "stages.sft.activation_checkpointing=full",
    ),
    "null": (
        TINY + "stages: {sft: {max_seq_len: null}}",
        "mine.yaml: stages.sft.max_seq_len=null is not a whole number",
    ),
    "null for a list": (
        TINY + "stages: {sft: {seeds: null}}",
        "mine.yaml: stages.sft.seeds=null is not a list; write stages.sft.seeds=[A, B]",
    ),
    "a number for a list": (
        TINY + "stages: {sft: {seeds: 42}}",
        "mine.yaml: stages.sft.seeds=42 is not a list; write stages.sft.seeds=[42]",
    ),
    "a list for a number": (
        TINY + "stages: {sft: {max_seq_len: [1, 2]}}",
        "mine.yaml: stages.sft.max_seq_len=[1, 2] is not a whole number",
    ),
    "item of a list": (TINY + "stages: {sft: {seeds: [a]}}", "mine.yaml: stages.sft.seeds=a is not a whole number"),
    "text for a node": (
        TINY + "stages: {sft: {lora: yes please}}",
        "mine.yaml: stages.sft.lora=yes please has no fields; give them, as stages.sft.lora={FIELD: VALUE}",
    ),
    "text for a stage": (
        TINY + "stages: {sft: fast}",
        "mine.yaml: stages.sft=fast has no fields; give them, as stages.sft={FIELD: VALUE}",
    ),
    "list for a mixture": (
        TINY + "data: {sft: [a.jsonl]}",
        "mine.yaml: data.sft=['a.jsonl'] has no fields; give them, as data.sft={FIELD: VALUE}",
    ),
    "list for names": (
        TINY + "data: {sft: {sources: [a.jsonl]}}",
        "mine.yaml: data.sft.sources=['a.jsonl'] is not a mapping; write it as data.sft.sources={NAME: VALUE}",
    ),
    "choice": (
        TINY + "stages: {sft: {packing: ffd}}",
        "mine.yaml: stages.sft.packing=ffd is not a choice; choose one of: bfd, wrapped, none",
    ),
    "interval": (TINY + "stages: {sft: {warmup_ratio: 3}}", "mine.yaml: stages.sft.warmup_ratio=3 is outside [0, 1)"),
    "nan": (
        TINY + "stages: {sft: {learning_rate: .nan}}",
        "mine.yaml: stages.sft.learning_rate=nan is not a finite number",
    ),
    "reference": (
        TINY + "stages: {sft: {data: stf}}",
        "mine.yaml: stages.sft.data=stf is not a mixture under data; did you mean sft? choose one of: base, long_context, mid, sft, prompts, preference, heldout, choose, heldout_prompts, heldout_pairs",
    ),
    "interpolation to nothing": (
        TINY + "stages: {sft: {max_steps: '${stepz}'}}",
        "mine.yaml: stages.sft.max_steps=${stepz}: stepz is not a key of the recipe; name a key from its root, such as ${run_dir}",
    ),
    "interpolation to another type": (
        TINY + "stages: {sft: {max_steps: '${run_dir}'}}",
        "mine.yaml: stages.sft.max_steps=${run_dir}: value 'runs' of type 'str' could not be converted to Integer",
    ),
    "interpolation that does not end": (
        TINY + "stages: {sft: {today: '${run_dir'}}",
        "mine.yaml: no viable alternative at input '${run_dir'; write ${KEY} for another key's value",
    ),
    "environment": (
        TINY + "stages: {sft: {today: '${oc.env:NOT_SET_AT_ALL}'}}",
        "mine.yaml: stages.sft.today=${oc.env:NOT_SET_AT_ALL}: the environment variable NOT_SET_AT_ALL is not set; export it, or write ${oc.env:NOT_SET_AT_ALL,DEFAULT}",
    ),
    "no value": (
        HEAD + DEFAULTS + "stages: {more: {kind: sft, data: sft, init_from: mid}}",
        "mine.yaml: stages.more.global_batch_size has no value; give it as stages.more.global_batch_size=VALUE",
    ),
    "tab": (TINY + "stages:\n\tsft: {}\n", "mine.yaml:6: a tab; YAML is indented with spaces"),
    "brackets": (
        TINY + "stages: {sft: {seeds: [1, 2}}\n",
        "mine.yaml:5: is not YAML (expected ',' or ']', but got '}'); quote values that hold : or # or brackets, and indent keys alike",
    ),
    "colon": (
        TINY + "run_dir: a: b\n",
        "mine.yaml:5: is not YAML (mapping values are not allowed here); quote values that hold : or # or brackets, and indent keys alike",
    ),
    "duplicate": (TINY + "seed: 1\nrun_dir: a\nseed: 2\n", "mine.yaml:7: seed stands twice; keep one of the two"),
    "empty": (
        "# nothing yet\n",
        "mine.yaml: is empty; write KEY: VALUE lines, or `tasks: {}` and the like for nothing",
    ),
    "list": ("- a\n- b\n", "mine.yaml: holds a list; write KEY: VALUE lines"),
    "text": ("tiny\n", "mine.yaml: holds a single value; write KEY: VALUE lines"),
    "number alone": ("3\n", "mine.yaml: holds a single value; write KEY: VALUE lines"),
    "bytes": (b"run_dir: \xff\xfe\n", "mine.yaml: is not text in UTF-8; save it as UTF-8"),
    "key of another type": (TINY + "1: x\n", "mine.yaml: the key 1 is not text; write '1' in quotes"),
    "no package line": (
        TINY.removeprefix(HEAD),
        "mine.yaml: a pipeline file starts with the line `# @package _global_`",
    ),
    "defaults as a mapping": (
        HEAD + "defaults: {/model: tiny}\n",
        "mine.yaml: defaults={'/model': 'tiny'} is not a list; write `- /GROUP: NAME` or `- _self_` in each line",
    ),
    "defaults with a number": (
        HEAD + "defaults:\n  - 3\n",
        "mine.yaml: defaults has the entry 3; write `- /GROUP: NAME` or `- _self_` in each line",
    ),
    "defaults with two keys": (
        HEAD + "defaults:\n  - {/model: tiny, /data: tiny}\n",
        "mine.yaml: defaults has the entry {'/model': 'tiny', '/data': 'tiny'}; write `- /GROUP: NAME` or `- _self_` in each line",
    ),
    "missing option": (
        HEAD + DEFAULTS.replace("/model: tiny", "/model: tinny"),
        "mine.yaml: model=tinny does not exist; did you mean tiny? choose one of: small, smollm3_3b, tiny",
    ),
    "missing group": (
        HEAD + DEFAULTS.replace("/model: tiny", "/modle: tiny"),
        "mine.yaml: modle is not a group; did you mean model? groups: pipeline, stage, model, data, evaluation, harness, accelerate, teacher",
    ),
    "missing config": (
        HEAD + DEFAULTS.replace("- /model: tiny", "- /model/tinny"),
        "mine.yaml: model=tinny does not exist; did you mean tiny? choose one of: small, smollm3_3b, tiny",
    ),
    "stage without a place": (
        HEAD + DEFAULTS.replace("/stage@stages.sft: sft", "/stage: sft"),
        "mine.yaml: stage/sft stands at stage; its place is stages.NAME or evaluation.tasks.NAME, written as `- /stage@stages.NAME: sft`",
    ),
    "no accelerate": (
        HEAD + DEFAULTS.replace("  - /accelerate: single\n", ""),
        "mine.yaml: chooses no accelerate config; add `- /accelerate: single` to its defaults",
    ),
    "override of what is not there": (
        HEAD + DEFAULTS.replace("/model: tiny", "override /model: tiny"),
        "mine.yaml: override 'model : tiny' is defined before 'data: tiny'.",
    ),
    "stage twice": (
        HEAD + DEFAULTS.replace("stages.mid: mid", "stages.sft: mid"),
        "mine.yaml: Multiple values for stage@stages.sft. To override a value use 'override stage@stages.sft: sft'",
    ),
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
        "own/stage/mine.yaml: stages.more has no kind; a new stage states it, `kind: KIND` in its file or stages.more.kind=KIND; choose one of: " + KINDS,
    ),
    "schema of no kind": (
        {"stage/mine.yaml": "defaults:\n  - /schema/sfft@_here_\n  - _self_\nseeds: [1]\n"}, ["+stage@stages.more=mine"],
        "own/stage/mine.yaml: schema=sfft does not exist; did you mean sft? choose one of: " + KINDS + ", instructions, perplexity, preference, reasoning, recall, ruler, tool_calls",
    ),
    "key in a stage file": (
        {"stage/sft.yaml": "defaults:\n  - /schema/sft@_here_\n  - _self_\nlerning_rate: 1\n"}, [],
        f"own/stage/sft.yaml: stages.sft.lerning_rate is not a key of the recipe; did you mean stages.sft.learning_rate? keys of stages.sft: {keys(SFTStage)}",
    ),
    "base of a stage file": (
        {"stage/sft.yaml": "defaults:\n  - smt\n  - _self_\nseeds: [1]\n"}, [],
        "own/stage/sft.yaml: stage=smt does not exist; did you mean sft? choose one of: " + STAGES,
    ),
    "a stage file that starts from itself": ({"stage/sft.yaml": "defaults:\n  - sft\n  - _self_\nseeds: [1]\n"}, [], "own/stage/sft.yaml: defaults has the entry sft, the file itself; give it another name"),
    "stage files that start from each other": (
        {"stage/a.yaml": "defaults: [b]\nseeds: [1]\n", "stage/b.yaml": "defaults: [a]\nseeds: [1]\n"}, ["+stage@stages.more=a"],
        "the defaults lists of own/stage/a.yaml, own/stage/b.yaml lead back to themselves; take an entry out",
    ),
    "kind that is a list": ({"stage/mine.yaml": "kind: [sft]\n"}, ["+stage@stages.more=mine"], "own/stage/mine.yaml: stages.more.kind=['sft'] is not a stage kind; choose one of: " + KINDS),
    "two accelerate configs": ({"pipeline/mine.yaml": HEAD + DEFAULTS.replace("/accelerate: single", "/accelerate: [single, ddp]")}, ["pipeline=mine"], "own/pipeline/mine.yaml: chooses no accelerate config; add `- /accelerate: single` to its defaults"),
    "evaluation is null": ({"pipeline/mine.yaml": TINY + "evaluation:\n"}, ["pipeline=mine", "evaluation=none"], "own/pipeline/mine.yaml: evaluation=null has no fields; give them, as evaluation={FIELD: VALUE}"),
    "tab in a data file": ({"data/tiny.yaml": "sft:\n\tsources: {}\n"}, [], "own/data/tiny.yaml:2: a tab; YAML is indented with spaces"),
    "duplicate in a data file": ({"data/tiny.yaml": "sft: {}\nsft: {}\n"}, [], "own/data/tiny.yaml:2: sft stands twice; keep one of the two"),
    "list in a data file": ({"data/tiny.yaml": "- a.jsonl\n"}, [], "own/data/tiny.yaml: holds a list; write KEY: VALUE lines"),
    "number in a data file": ({"data/tiny.yaml": "3\n"}, [], "own/data/tiny.yaml: holds a single value; write KEY: VALUE lines"),
    "value in a data file": ({"data/mine.yaml": "sft: {sources: {a: {path: x, weight: lots}}}\n"}, ["data=mine"], "own/data/mine.yaml: data.sft.sources.a.weight=lots is not a number"),
    "weight in a data file": ({"data/mine.yaml": "sft: {sources: {a: {path: x, weight: 0}}}\n"}, ["data=mine"], "own/data/mine.yaml: data.sft.sources.a.weight=0 must be above 0"),
    "key in a model file": ({"model/mine.yaml": "architecture: {hiden_size: 64}\n"}, ["model=mine"], f"own/model/mine.yaml: model.architecture.hiden_size is not a key of the recipe; did you mean model.architecture.hidden_size? keys of model.architecture: {keys(schema.Architecture)}"),
    "key in a task": (
        {"evaluation/mine.yaml": "tasks: {loss: {kind: perplexity, rows: 3}}\n"}, ["evaluation=mine"], f"own/evaluation/mine.yaml: evaluation.tasks.loss.rows is not a key of the recipe; did you mean evaluation.tasks.loss.max_rows? keys of evaluation.tasks.loss: {keys(PerplexityTask)}"
    ),
    "processes": ({"accelerate/mine.yaml": "num_processes: '2'\n"}, ["accelerate=mine"], "own/accelerate/mine.yaml: accelerate.num_processes='2' is not a whole number above 0; write 1 or more"),
    "no pipeline of that name": ({"pipeline/mine.yaml": TINY}, ["pipeline=mne"], "pipeline=mne does not exist; did you mean mine? choose one of: gsm8k, mine, smollm3, smollm3_ablated, smollm3_data, smollm3_from_release, teachers, tiny, tiny_distill"),
    "word for what a folder has": ({"pipeline/mine.yaml": TINY}, ["pipeline=mine", "stages.sft.lerning_rate=1"], f"stages.sft.lerning_rate is not a key of the recipe; did you mean stages.sft.learning_rate? keys of stages.sft: {keys(SFTStage)}"),
    "word for a source": ({"pipeline/mine.yaml": TINY}, ["pipeline=mine", "data.sft.sources.task.path=x"], "data.sft.sources.task is not a key of the recipe; did you mean data.sft.sources.tasks? keys of data.sft.sources: tasks"),
    "word for accelerate": ({"pipeline/mine.yaml": TINY}, ["pipeline=mine", "accelerate.num_proceses=2"], "accelerate.num_proceses is not a key of the recipe; did you mean accelerate.num_processes? keys of accelerate: compute_environment, distributed_type, machine_rank, mixed_precision, num_machines, num_processes, use_cpu"),
    "word for a task": ({"pipeline/mine.yaml": TINY}, ["pipeline=mine", "evaluation.tasks.anser.max_rows=2"], "evaluation.tasks.anser is not a key of the recipe; did you mean evaluation.tasks.answer? keys of evaluation.tasks: answer, choose, choose_pairs, loss, pairs, recall; +evaluation.tasks.anser=VALUE adds one"),
    "word for an input": ({"pipeline/mine.yaml": TINY}, ["pipeline=mine", "stages.merge.inputs.sop=2"], "stages.merge.inputs.sop is not a key of the recipe; did you mean stages.merge.inputs.soup? keys of stages.merge.inputs: long_context, soup"),
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
    # A file with the name of a shipped pipeline is the file, and is said to be where it is found by that name.
    write(here, {"tiny.yaml": TINY + "pipeline: other\n"})
    for word, replaced in (
        ("pipeline=tiny.yaml", ()),
        ("pipeline=tiny", ("tiny.yaml replaces the library's pipeline/tiny.yaml",)),
    ):
        found = recipe.load([word])
        assert (found.recipe.pipeline, found.replaced, found.overrides) == ("other", replaced, (word,))
    assert recipe.load([]).recipe.pipeline == "tiny"


def test_a_pipeline_of_the_users_own_is_found_by_name(here):
    """The first of --recipes FOLDERs, the current folder and the library that has one wins."""

    def pipeline(seed: int) -> str:
        return f"{TINY}pipeline: mine\nseed: {seed}\n"

    def seed(*words: str) -> int:
        found = recipe.load([*words, "pipeline=mine"])
        assert found.overrides == (*(word.replace("config-dir", "recipes") for word in words), "pipeline=mine")
        return found.recipe.seed

    write(here, {"pipeline/mine.yaml": pipeline(1), "b/pipeline/mine.yaml": pipeline(3), "a/mine.yaml": pipeline(4)})
    write(here, {"a/stage/sft.yaml": (room("recipes") / "stage" / "sft.yaml").read_text()})
    assert seed() == 1
    write(here, {"mine.yaml": pipeline(2)})
    assert seed() == 2
    assert seed("--recipes=b") == 3
    assert seed("--recipes=b", "--config-dir=a") == 3
    assert seed("--config-dir=a", "--recipes=b") == 4
    assert recipe.load(["--config-dir=a", "pipeline=mine"]).replaced == (
        "a/stage/sft.yaml replaces the library's stage/sft.yaml",
    )


def test_files_that_are_not_pipelines_are_not_found_by_name(here):
    config = "model: gpt2\n"
    write(here, {"tiny.yaml": config, "mine.yaml": TINY, "pipeline/third.yaml": TINY, "other.yaml": config})
    assert recipe.load(["pipeline=tiny"]).replaced == ()
    known = "gsm8k, mine, smollm3, smollm3_ablated, smollm3_data, smollm3_from_release, teachers, third, tiny, "
    assert refusal("pipeline=mne") == (
        f"pipeline=mne does not exist; did you mean mine? choose one of: {known}tiny_distill"
    )
    assert refusal("pipeline=other") == (
        "pipeline=other does not exist; other.yaml does not begin with the line `# @package _global_`, as a pipeline "
        "does; add it"
    )
    write(here, {"more.yaml": HEAD + "defaults:\n  - /pipeline/mine\n  - _self_\n"})
    assert refusal("pipeline=more") == (
        "more.yaml: pipeline=mine does not exist; a defaults list does not find mine.yaml; move it to pipeline/mine.yaml"
    )
    (here / "pipeline" / "mine.yaml").write_text((here / "mine.yaml").read_text())
    assert recipe.load(["pipeline=more"]).recipe.pipeline == "tiny"  # the name that it starts from


def test_a_pipeline_without_a_name_is_called_as_its_file(here):
    pipeline = HEAD + DEFAULTS.replace("/data: tiny", "/data: rows").replace("sft: sft", "sft: mine")
    rows = "mid: {sources: {a: {path: x.jsonl}}}\nsft: {sources: {a: {path: x.jsonl}}}\n"
    write(here / "my plans", {"über.yaml": pipeline + "stages: {mid: {init_from: init}}\n"})
    write(here / "my plans", {"stage/mine.yaml": MINE, "data/rows.yaml": rows})
    found = recipe.load([f"pipeline={here}/my plans/über.yaml"])
    assert found.recipe.pipeline == "über"
    assert found.recipe.stages["sft"] == SFTStage(
        init_from="mid", data="sft", max_seq_len=64, learning_rate=1e-3, global_batch_size=8, lora=LoRA(r=4)
    )


MINE = (
    "kind: sft\ninit_from: mid\ndata: sft\nmax_seq_len: 64\nlearning_rate: 1e-3\nglobal_batch_size: 8\nlora: {r: 4}\n"
)


def test_a_stage_file_may_state_its_kind_alone_or_start_from_a_shipped_one(here):
    write(here, {"stage/mine.yaml": MINE, "stage/long.yaml": "defaults:\n  - sft\n  - _self_\nmax_seq_len: 131072\n"})
    found = recipe.load(["--recipes=.", "+stage@stages.more=mine", "+stage@stages.long=long"]).recipe.stages
    assert (type(found["more"]), found["more"].lora.r) == (SFTStage, 4)
    assert (found["long"].max_seq_len, found["long"].num_epochs) == (131072, 5)


def test_folders_are_searched_in_their_order_and_a_replaced_file_is_said(here):
    write(here / "a", {"model/tiny.yaml": "architecture: {hidden_size: 32}\n"})
    write(
        here / "b's",
        {"model/tiny.yaml": "architecture: {hidden_size: 16}\n", "accelerate/node.yaml": "num_processes: 2\n"},
    )
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


def test_a_stage_that_states_its_kind_may_set_the_settings_of_its_loss(here):
    stage = "kind: apo, data: preference, max_seq_len: 64, global_batch_size: 2, init_from: init"
    write(
        here, {"mine.yaml": TINY + f"stages: {{x: {{{stage}, loss: robust, loss_settings: {{label_smoothing: 0.1}}}}}}"}
    )
    assert recipe.load(["pipeline=./mine.yaml"]).recipe.stages["x"].loss_settings == {"label_smoothing": 0.1}
