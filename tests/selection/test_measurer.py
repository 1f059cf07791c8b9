"""What a search over weights measures its points with: prompts made once, scores as the evaluation's own."""

import pytest
from char_model import char_model, char_tokenizer

from smolpost.evaluation.run import run_task
from smolpost.evaluation.task import Context
from smolpost.evaluation.tasks.recall import RecallTask
from smolpost.inference.local import LocalEngine
from smolpost.schema import RELEASE_DAY
from smolpost.selection.live import measurer


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


def recall():
    return RecallTask(lengths=[256], num_prompts=4, pairs=4, queries=4).build(
        "recall", Context(RELEASE_DAY, 3, lambda name: [])
    )


def test_points_have_the_evaluations_scores_and_their_prompts_are_made_once(tokenizer, tmp_path):
    task, calls = recall(), []
    items = task.items
    task.items = lambda tokenizer: calls.append(tokenizer) or items(tokenizer)
    measure, model = measurer({"recall": task}, batch_tokens=4096, seed=3), char_model(tokenizer)
    found = [measure(model, tokenizer, tmp_path / point)["recall"] for point in ("a", "b")]
    assert len(calls) == 1
    alone = run_task("recall", recall(), LocalEngine(model, tokenizer), tmp_path / "alone", batch_tokens=4096, seed=3)
    for result in found:
        assert {key: result[key] for key in ("scores", "notes", "num_items")} == {
            key: alone[key] for key in ("scores", "notes", "num_items")
        }
        assert sorted(sample["id"] for sample in result["samples"]) == [f"256/{i}" for i in range(4)]
