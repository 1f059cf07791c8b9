"""Margins are sums of the model's own log-probabilities, on the tokens that training scores."""

import pytest
import torch

from smolpost.data.rows import Row
from smolpost.errors import UserError
from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Context
from smolpost.evaluation.tasks.preference import Preference, PreferenceTask
from smolpost.inference.local import LocalEngine
from tests.small import sum_rows

TODAY = "08 July 2025"


def pair(right, wrong, thinking=False, question="1+1?"):
    ask = {"role": "user", "content": question}
    sides = ([ask, {"role": "assistant", "content": reply}] for reply in (right, wrong))
    return dict(zip(("chosen", "rejected"), sides, strict=True)) | {
        "chat_template_kwargs": {"enable_thinking": thinking}
    }


ROWS = [
    ("sums", pair("it is 2", "it is certainly 3")),
    ("sums", pair("<think>\none more\n</think>\n2", "<think>\none and one\n</think>\n3", True)),
    ("talk", pair("fine and you?", "no", question="how are you?")),
]


def made(rows, **settings):
    config = PreferenceTask(data="kept", **settings)
    return Preference("pairs", config, Context(TODAY, 0, {"kept": list(rows)}.__getitem__))


def measured(task, model, tokenizer):
    return task.measure(LocalEngine(model, tokenizer), task.items(tokenizer))


def reply_logps(model, tokenizer, messages, thinking):
    """Log-probabilities of a reply and its stop token, from the full logits of transformers' rendering."""
    options = {"enable_thinking": thinking, "today": TODAY, "tokenize": False}
    text = tokenizer.apply_chat_template(messages, **options)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    assert text.startswith(prompt)
    prompt_ids, ids = (tokenizer.encode(t, add_special_tokens=False) for t in (prompt, text.removesuffix("\n")))
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logps[i - 1, ids[i]].item() for i in range(len(prompt_ids), len(ids))]


def test_margins_are_differences_of_summed_logps(model, tokenizer):
    samples = measured(made(ROWS), model, tokenizer)
    for sample, (_, row) in zip(samples, ROWS, strict=True):
        thinking = row["chat_template_kwargs"]["enable_thinking"]
        chosen, rejected = (reply_logps(model, tokenizer, row[side], thinking) for side in ("chosen", "rejected"))
        metrics = sample.metrics
        assert metrics["margin/chosen"] == pytest.approx(sum(chosen), rel=1e-5)
        assert metrics["margin/rejected"] == pytest.approx(sum(rejected), rel=1e-5)
        assert metrics["margin"] == pytest.approx(sum(chosen) - sum(rejected), abs=1e-4)
        assert metrics["accuracy"] == (sum(chosen) > sum(rejected))
        per_token = sum(chosen) / len(chosen) - sum(rejected) / len(rejected)
        assert metrics["margin/per_token"] == pytest.approx(per_token, abs=1e-5)
        assert metrics["accuracy/per_token"] == (per_token > 0)


def test_scores_by_mode_and_source(model, tokenizer):
    samples = measured(made(ROWS), model, tokenizer)
    found = aggregate(samples)
    right = [sample.metrics["accuracy"] for sample in samples]
    assert found["accuracy"]["value"] == pytest.approx(sum(right) / 3)
    assert found["accuracy/think"]["value"] == right[1]
    assert found["accuracy/no_think"]["value"] == pytest.approx((right[0] + right[2]) / 2)
    assert found["accuracy/sums"]["value"] == pytest.approx((right[0] + right[1]) / 2)
    assert [metric for metric in found if "/" not in metric] == ["accuracy", "margin"]
    one = aggregate(measured(made(ROWS[:2]), model, tokenizer))
    assert not any("sums" in metric for metric in one)


class Flat:
    """Gives every token of a sequence the same log-probability."""

    def __init__(self, tokenizer, *logps):
        self.tokenizer, self.given = tokenizer, iter(logps)

    def logps(self, sequences):
        logp = next(self.given)
        return [[logp] * len(places) for _, places in sequences]


def test_the_longer_side_loses_by_sum_and_not_by_token(tokenizer):
    [sample] = made(ROWS[:1]).measure(Flat(tokenizer, -1.0, -0.9), made(ROWS[:1]).items(tokenizer))
    num_chosen, num_rejected = len("it is 2") + 1, len("it is certainly 3") + 1
    assert sample.metrics["margin"] == pytest.approx(-num_chosen + 0.9 * num_rejected)
    assert sample.metrics["accuracy"] == 1
    assert sample.metrics["accuracy/per_token"] == 0
    assert sample.metrics["margin/per_token"] == pytest.approx(-0.1)


def test_a_tie_counts_half(tokenizer):
    task = made([("sums", pair("2", "3"))])
    [sample] = task.measure(Flat(tokenizer, -1.0, -1.0), task.items(tokenizer))
    assert (sample.metrics["accuracy"], sample.metrics["margin"]) == (0.5, 0)


def test_pairs_in_a_batch_are_as_alone(model, tokenizer):
    rows = [("sums", row) for row in sum_rows(6, seed=0)]
    task, engine = made(rows), LocalEngine(model, tokenizer)
    items = task.items(tokenizer)
    alone = [task.measure(engine, [item])[0] for item in items]
    for together, single in zip(task.measure(engine, items), alone, strict=True):
        assert together.id == single.id
        assert together.metrics == pytest.approx(single.metrics, abs=1e-4)


def test_an_item_is_as_long_as_its_longer_side(tokenizer):
    for item in made(ROWS).items(tokenizer):
        assert len(item.ids) == max(len(item.about.chosen.ids), len(item.about.rejected.ids))


def test_pairs_that_cannot_be_told_apart_are_passed_over_and_counted(tokenizer):
    untrained = pair("2", "3")
    untrained["chosen"][1]["train"] = False
    unseen = pair("2", "2")
    unseen["rejected"][1]["note"] = "the template does not show this"
    task = made([("sums", untrained), ("sums", unseen), *ROWS], max_rows=2)
    assert [item.id for item in task.items(tokenizer)] == ["2", "3"]
    assert task.notes == {"pairs_without_trained_token": 1, "pairs_equal": 1}


def test_a_sample_says_what_was_scored(model, tokenizer):
    task = made([("sums", Row(ROWS[0][1], "held.jsonl", 7))])
    [sample] = measured(task, model, tokenizer)
    assert (sample.record["row"], sample.record["mode"]) == ("held.jsonl:7", "no_think")
    assert sample.record["chosen"]["scored_text"] == "it is 2<|im_end|>"
    assert sample.record["rejected"]["logp"] == sample.metrics["margin/rejected"]
    assert sample.record["prompt"].endswith("assistant\n<think>\n\n</think>\n")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", Row({"messages": ROWS[0][1]["chosen"]}, "held.jsonl", 3))], "held.jsonl:3: .*expected chosen and rej"),
        ([("think", ROWS[0][1]), ("b", ROWS[1][1])], "data=kept: the source 'think' has the name of a metric"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(tokenizer, rows, message):
    with pytest.raises(UserError, match=message):
        made(rows).items(tokenizer)


def test_a_limit_below_one_is_refused():
    with pytest.raises(UserError, match=r"evaluation.tasks.pairs.max_rows=0 is below 1"):
        made(ROWS, max_rows=0)
