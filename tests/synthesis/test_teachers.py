# ruff: noqa: E501 - whole lines are compared
"""Teachers as recipe files: what they hold, how a pipeline and a command line choose them, and what a mistake says."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.recipe import room
from smolpost.stages.everyday_conversations import EverydayConversationsStage
from smolpost.stages.judge import JudgeStage
from smolpost.stages.mode_switch import ModeSwitchStage
from smolpost.stages.pairs import PairsStage
from smolpost.stages.reasoning_traces import ReasoningTracesStage
from smolpost.stages.rejection_samples import RejectionSamplesStage
from smolpost.synthesis.settings import Teacher

NAMES = sorted(file.stem for file in (room("recipes") / "teacher").glob("*.yaml"))
CHOICES = ", ".join(NAMES)
PIPELINE = """# @package _global_
defaults:
  - /model: tiny
  - /accelerate: single
  - /stage@stages.traces: reasoning_traces
  - /teacher@stages.traces.teacher: qwen3_32b
  - _self_
data:
  prompts: {sources: {q: {path: q.jsonl}}}
"""
CHOSEN = "teacher@stages.traces.teacher"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a pipeline of one stage and its row."""
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(PIPELINE)
    Path("q.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}], "source": "s"}\n')
    return tmp_path


def teacher(*words: str) -> Teacher:
    return recipe.load(["pipeline=./p.yaml", *words]).recipe.stages["traces"].teacher


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as error:
        teacher(*words)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "model", "sampling"),
    [
        ("qwen3_32b", "Qwen/Qwen3-32B", (True, 0.6, 0.95, 20, 0.0)),
        ("qwen3_32b_no_think", "Qwen/Qwen3-32B", (False, 0.7, 0.8, 20, 0.0)),
        ("qwen3_0_6b", "Qwen/Qwen3-0.6B", (True, 0.6, 0.95, 20, 0.0)),
        ("qwen3_0_6b_no_think", "Qwen/Qwen3-0.6B", (False, 0.7, 0.8, 20, 0.0)),
    ],
)
def test_qwen3_samples_as_its_model_card_says(here, name, model, sampling):
    found = teacher(f"{CHOSEN}={name}")
    assert found.model == model and found.server == "vllm" and found.max_new_tokens == 32768
    assert (found.thinking, found.temperature, found.top_p, found.top_k, found.min_p) == sampling


def test_the_pipeline_chooses_and_the_command_line_replaces_and_changes(here):
    assert teacher().model == "Qwen/Qwen3-32B"
    found = teacher(f"{CHOSEN}=hosted", "stages.traces.teacher.model=m", "stages.traces.teacher.url=https://h/v1")
    assert (found.server, found.model, found.top_k, found.api_key_env) == ("hosted", "m", None, "OPENAI_API_KEY")
    found = teacher(
        f"{CHOSEN}=checkpoint", "stages.traces.teacher.stage=checkpoint", "model.checkpoint=HuggingFaceTB/SmolLM3-3B"
    )
    assert (found.stage, found.model, found.url) == ("checkpoint", None, None)
    assert teacher("+stages.traces.teacher.serve.tensor-parallel-size=4").serve == {"tensor-parallel-size": "4"}


def test_a_teacher_of_ones_own_stands_before_the_librarys(here):
    Path("mine/teacher").mkdir(parents=True)
    Path("mine/teacher/qwen3_32b.yaml").write_text("model: me/mine\nurl: http://h/v1\n")
    assert teacher("--recipes=mine").model == "me/mine"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([f"{CHOSEN}=qwen_32b"], f"teacher=qwen_32b does not exist; did you mean qwen3_32b? choose one of: {CHOICES}"),
        (["teacher=hosted"], "teacher is chosen for one place at a time; write teacher@stages.traces.teacher=NAME"),
        (
            ["teacher@stages.trace.teacher=hosted"],
            "teacher@stages.trace.teacher: this pipeline chooses no teacher at stages.trace.teacher; did you mean stages.traces.teacher? +teacher@stages.trace.teacher=NAME adds one",
        ),
        (
            ["harness@x=none"],
            "harness@x: a recipe has one harness, at no place of its own; write harness=NAME",
        ),
    ],
)
def test_a_wrong_choice_is_one_line(here, words, line):
    assert refusal(*words) == line


def test_a_pipeline_without_teachers_says_how_to_add_one(here):
    Path("p.yaml").write_text(PIPELINE.replace("  - /teacher@stages.traces.teacher: qwen3_32b\n", ""))
    assert (
        refusal("teacher=hosted")
        == "teacher is chosen for one place at a time; write +teacher@stages.NAME.teacher=NAME"
    )
    assert refusal(f"{CHOSEN}=hosted").endswith(f"chooses no teacher at stages.traces.teacher; +{CHOSEN}=NAME adds one")
    assert teacher(f"+{CHOSEN}=qwen3_0_6b").model == "Qwen/Qwen3-0.6B"


def test_a_setting_that_the_server_does_not_take_names_its_file(here):
    line = refusal("stages.traces.teacher.server=hosted")
    assert (
        "qwen3_32b.yaml: stages.traces.teacher.top_k=20 is not a setting of a hosted API (server=hosted); set" in line
    )


def test_a_file_with_a_wrong_key_names_it(here):
    Path("mine/teacher").mkdir(parents=True)
    Path("mine/teacher/own.yaml").write_text("model: m\ntopk: 3\n")
    line = refusal("--recipes=mine", f"{CHOSEN}=own")
    assert line.startswith(
        "mine/teacher/own.yaml: stages.traces.teacher.topk is not a key of the recipe; did you mean stages.traces.teacher.top_k?"
    )


@pytest.mark.parametrize(
    ("stage", "role", "modes"),
    [
        (ReasoningTracesStage(), "teacher", {True}),
        (RejectionSamplesStage(), "teacher", {None}),
        (PairsStage(chosen=Teacher(thinking=False), rejected=Teacher(thinking=False)), "rejected", {False}),
        (ModeSwitchStage(), "teacher", {True, False}),
        (JudgeStage(), "teacher", {False}),
        (EverydayConversationsStage(), "teacher", {False}),
        (EverydayConversationsStage(teacher=Teacher(thinking=True)), "teacher", {True, False}),
    ],
)
def test_a_server_is_tried_in_the_modes_that_its_stage_asks_for(stage, role, modes):
    for name in stage.ROLES:
        setattr(stage, name, replace(getattr(stage, name), url="http://localhost:1/v1"))
    engine = stage.engine(role, SimpleNamespace(stage=SimpleNamespace(entry="made")))
    assert set(engine.modes) == modes and engine.key == f"stages.made.{role}"
