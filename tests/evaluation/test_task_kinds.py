"""Kinds of evaluation task: one file each, found by the class and not by the file's name, cheap to import."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from smolpost import recipe, registry
from smolpost.errors import UserError
from smolpost.evaluation.task import Context, EvaluationTask, Item, Measurement, Sample, measures
from smolpost.schema import RELEASE_DAY, count

KINDS = ["instructions", "perplexity", "preference", "reasoning", "recall", "ruler", "tool_calls"]
CONTEXT = Context(RELEASE_DAY, 0, lambda mixture: [])
FIELDS = {"ruler": {"tasks": ["niah_single_1"]}, "tool_calls": {"questions": "q.jsonl", "answers": "a.jsonl"}}


def test_importing_the_kinds_costs_no_torch_and_no_transformers():
    code = (
        "import smolpost.evaluation.tasks, sys\n"
        "from smolpost.registry import TASK_KINDS\n"
        "print(*TASK_KINDS, *({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_declares_a_version_of_its_own_and_builds_its_measurement(kind):
    config = registry.TASK_KINDS[kind](**FIELDS.get(kind, {}))
    assert config.kind == kind
    assert type(vars(type(config))["VERSION"]) is int
    built = config.build("mine", CONTEXT)
    assert (type(built).__module__, built.key, built.config, built.notes) == (
        type(config).__module__, "evaluation.tasks.mine", config, {},
    )  # fmt: skip


@pytest.fixture
def kinds(monkeypatch):
    """The registry, without what a test adds to it."""
    monkeypatch.setattr(registry.TASK_KINDS, "_entries", dict(registry.TASK_KINDS))


def test_a_kind_from_another_file_is_known_to_recipes(kinds):
    @dataclass
    class LengthTask(EvaluationTask):
        kind: str = "length"
        max_rows: int = count(3)

    @measures(LengthTask)
    class Length(Measurement):
        def items(self, tokenizer):
            return [Item("0", [1])]

        def measure(self, engine, items):
            return [Sample(item.id, {"tokens": float(len(item.ids))}) for item in items]

    task = "+evaluation.tasks.long={kind:length,max_rows:2}"
    loaded = recipe.load(["pipeline=tiny", task]).recipe.evaluation.tasks["long"]
    assert loaded == LengthTask(max_rows=2) and isinstance(loaded.build("long", CONTEXT), Length)
    with pytest.raises(UserError, match=r"evaluation\.tasks\.long\.max_rows=0"):
        recipe.load(["pipeline=tiny", "+evaluation.tasks.long={kind:length,max_rows:0}"])
    with pytest.raises(UserError, match=r"VERSION is not a key of the recipe; keys of .*: kind, max_rows, stages$"):
        recipe.load(["pipeline=tiny", "+evaluation.tasks.long={kind:length,VERSION:2}"])


def test_a_name_that_is_taken_is_refused(kinds):
    @dataclass
    class OtherRecall(EvaluationTask):
        kind: str = "recall"

    with pytest.raises(
        UserError, match=r"adds the evaluation task recall, which smolpost\.evaluation\.tasks\.recall has"
    ):
        measures(OtherRecall)(Measurement)
