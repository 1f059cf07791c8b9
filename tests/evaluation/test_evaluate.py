"""The whole evaluation on a tiny model: its numbers are those of its parts, what is not asked for is None."""

import io
import json

import pytest
from rich.console import Console

from smolpost.evaluation.evaluate import evaluate, results_table
from smolpost.evaluation.heldout import accuracy, heldout_loss
from smolpost.evaluation.retrieval import retrieval
from smolpost.schema import Evaluation, Mixture, Retrieval, Source

SYMBOLS = Retrieval(style="symbols", lengths=[48, 64], num_prompts=3, pairs=3, queries=2)


@pytest.fixture
def rows():
    """Return two think rows and a no-think row."""
    return [
        {
            "messages": [{"role": "user", "content": f"{i}+{i}?"}, {"role": "assistant", "content": str(2 * i)}],
            "chat_template_kwargs": {"enable_thinking": i < 2},
            "source": "sums",
        }
        for i in range(3)
    ]


@pytest.fixture
def mixture(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Mixture(sources={"sums": Source(path=str(path))}, shuffle=False)


def test_the_numbers_are_those_of_the_parts(model, tokenizer, rows, mixture):
    spec = Evaluation(retrieval=SYMBOLS, max_new_tokens=8, batch_size=2, accuracy_rows=2)
    result = evaluate(model, tokenizer, spec, mixture)
    shared = dict(today=spec.today, batch_size=2)
    loss = heldout_loss(model, tokenizer, rows, max_rows=200, **shared)
    answered = accuracy(
        model, tokenizer, rows, answer_pattern=spec.answer_pattern, max_new_tokens=8, max_rows=2, **shared
    )
    found = retrieval(model, tokenizer, SYMBOLS, seed=0, **shared)
    assert result["loss"] == {mode: loss[mode]["loss"] for mode in ("think", "no_think")}
    assert result["accuracy"] == {mode: answered[mode] for mode in ("think", "no_think")}
    assert result["retrieval"] == {str(length): found[length]["found"] for length in (48, 64)}
    assert result["counts"] == {
        "loss_tokens": {"think": 4, "no_think": 2},  # one digit and the stop token in each row
        "loss_rows": {"think": 2, "no_think": 1},
        "accuracy_prompts": 2,
        "accuracy_unscored": 0,
        "accuracy_cut": answered["cut"],
        "retrieval_prompt_tokens": {"48": 43.0, "64": 59.0},
    }
    assert sorted(result["seconds"]) == ["accuracy", "loss", "retrieval"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("heldout", ["heldout", None])
def test_what_is_not_asked_for_is_none(model, tokenizer, mixture, heldout):
    given = None if heldout else mixture
    nothing = {"loss": None, "accuracy": None, "retrieval": None, "counts": {}, "seconds": {}}
    assert evaluate(model, tokenizer, Evaluation(heldout=heldout, retrieval=None), given) == nothing
    only = evaluate(model, tokenizer, Evaluation(heldout=heldout, retrieval=SYMBOLS), given)
    assert (only["loss"], only["accuracy"], sorted(only["retrieval"])) == (None, None, ["48", "64"])


def test_zero_rows_give_no_numbers(model, tokenizer, mixture):
    spec = Evaluation(retrieval=None, loss_rows=0, accuracy_rows=0)
    result = evaluate(model, tokenizer, spec, mixture)
    assert result["loss"] == result["accuracy"] == {"think": None, "no_think": None}


def test_the_table_has_a_row_per_stage_and_a_column_per_number():
    results = {
        "sft": {"loss": {"think": 0.5, "no_think": None}, "accuracy": {"think": 1.0, "no_think": 0.25}},
        "soup": {"loss": None, "accuracy": None, "retrieval": {"1024": 0.875, "64": 1.0}},
    }
    results["sft"]["retrieval"] = None
    columns = results_table(results).columns
    headers = [column.header.replace("\n", " ") for column in columns]
    assert headers == [
        "stage",
        "loss think",
        "loss no-th.",
        "acc. think",
        "acc. no-th.",
        "recall 64",
        "recall 1024",
    ]
    rows = list(zip(*(column.cells for column in columns), strict=True))
    assert rows == [("sft", "0.500", "-", "1.000", "0.250", "-", "-"), ("soup", "-", "-", "-", "-", "1.000", "0.875")]


def test_three_lengths_fit_a_terminal_of_80_characters():
    both = {"think": 1.0, "no_think": 1.0}
    result = {"loss": both, "accuracy": both, "retrieval": {"256": 1.0, "1024": 1.0, "4096": 1.0}}
    console = Console(width=80, file=io.StringIO())
    console.print(results_table({"long-context": result}))
    assert "…" not in console.file.getvalue()
