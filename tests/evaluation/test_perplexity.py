"""Losses are transformers' own, by mode and source, on the tokens that training trains."""

import pytest
import torch

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode
from smolpost.data.rows import Row
from smolpost.errors import UserError
from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Context
from smolpost.evaluation.tasks.perplexity import Perplexity, PerplexityTask
from smolpost.inference.local import LocalEngine

TODAY = "08 July 2025"


def conversation(question, answer, thinking=None, **kwargs):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if thinking is not None:
        kwargs["enable_thinking"] = thinking
    return {"messages": messages, "chat_template_kwargs": kwargs}


ROWS = [
    ("sums", conversation("1+1?", "<think>\none more\n</think>\n2", True)),
    ("sums", conversation("2+2?", "4", False)),
    ("talk", conversation("how are you?", "<think>\nthey want to know how I am\n</think>\nfine")),
    ("talk", conversation("4+4?", "it is 8", False, custom_instructions="Be polite.")),
    ("sums", conversation("5+5?", "10", None)),
    ("sums", {**conversation("6+6?", "12"), "chat_template_kwargs": None}),
]
THINK, NO_THINK = [0, 2, 4, 5], [1, 3]


def made(rows, **settings):
    config = PerplexityTask(data="kept", **settings)
    return Perplexity("loss", config, Context(TODAY, 0, {"kept": list(rows)}.__getitem__))


def scores(task, model, tokenizer, batch_size=50):
    """Scores of a task measured in batches, as the runner does it."""
    engine, items = LocalEngine(model, tokenizer), task.items(tokenizer)
    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    return aggregate(sample for batch in batches for sample in task.measure(engine, batch))


def reference(model, tokenizer, rows):
    """Nats per trained token by transformers' own loss, row by row."""
    nats = num_tokens = 0
    for _, row in rows:
        ids, fates, *_ = encode(tokenizer, row["messages"], template_kwargs=row["chat_template_kwargs"], today=TODAY)
        trained = [fate == Fate.TRAINED for fate in fates]
        labels = [token if mine else -100 for token, mine in zip(ids, trained, strict=True)]
        with torch.no_grad():
            nats += model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * sum(trained)
        num_tokens += sum(trained)
    return nats / num_tokens


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_losses_are_transformers_losses(model, tokenizer, batch_size):
    found = scores(made(ROWS), model, tokenizer, batch_size)
    groups = {"think": THINK, "no_think": NO_THINK, "think/talk": [2], "think/sums": [0, 4, 5], "no_think/talk": [3]}
    for metric, rows in groups.items():
        expected = reference(model, tokenizer, [ROWS[i] for i in rows])
        assert found[metric]["value"] == pytest.approx(expected, rel=1e-5), metric
        assert found[metric]["n"] == len(rows)
    assert found.keys() == groups.keys() | {"no_think/sums"}


def test_one_source_has_no_metric_of_its_own(model, tokenizer):
    rows = [("sums", row) for _, row in ROWS]
    assert scores(made(rows), model, tokenizer).keys() == {"think", "no_think"}


def test_the_limit_is_per_source_and_mode_and_takes_the_first_rows(tokenizer):
    items = made(ROWS, max_rows=2).items(tokenizer)
    assert [item.id for item in items] == [
        "think/sums/0", "think/sums/1", "think/talk/0", "no_think/sums/0", "no_think/talk/0",
    ]  # fmt: skip
    assert "5+5" in tokenizer.decode(items[1].ids)
    assert [i.id for i in made(ROWS, max_rows=None).items(tokenizer)][:3] == [f"think/sums/{i}" for i in range(3)]


def test_a_text_trains_all_tokens_but_its_first(model, tokenizer):
    text = "the quick brown fox"
    task = made([("web", {"text": text}), *ROWS[:1]])
    found = scores(task, model, tokenizer)
    ids = torch.tensor([tokenizer.encode(text + "<|end_of_text|>", add_special_tokens=False)])
    with torch.no_grad():
        assert found["text"]["value"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    [sample] = task.measure(LocalEngine(model, tokenizer), [i for i in task.items(tokenizer) if "text" in i.id])
    assert sample.record["trained_tokens"] == ids.shape[1] - 1


def test_rows_without_a_trained_token_are_passed_over_and_counted(model, tokenizer):
    untrained = conversation("1+1?", "2", False)
    untrained["messages"][1]["train"] = False
    task = made([("sums", untrained), *ROWS[:2]], max_rows=1)
    found = scores(task, model, tokenizer)
    assert task.notes == {"rows_without_trained_token": 1}
    assert found["no_think"]["value"] == pytest.approx(reference(model, tokenizer, [ROWS[1]]), rel=1e-5)


def test_a_sample_says_what_was_scored(model, tokenizer):
    task = made([("sums", Row(ROWS[1][1], "held.jsonl", 7))])
    [sample] = task.measure(LocalEngine(model, tokenizer), task.items(tokenizer))
    record = sample.record
    assert (record["row"], record["source"], record["mode"]) == ("held.jsonl:7", "sums", "no_think")
    assert record["trained_text"] == "4<|im_end|>" and record["trained_tokens"] == 2
    assert record["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    assert sample.weights == {"no_think": 2}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "web"}, "a row of source 'web': has the columns source; expected messages"),
        (Row({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
              "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}, "held.jsonl", 3),
         "held.jsonl:3: is a preference row; .*data.kept"),
        (Row(conversation("1+1?", "2", thinking="yes"), "held.jsonl", 7),
         r"held.jsonl:7: .*enable_thinking='yes' is not a boolean"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_scored_is_named(tokenizer, row, message):
    with pytest.raises(UserError, match=message):
        made([("web", row)]).items(tokenizer)


def test_a_limit_below_one_is_refused():
    with pytest.raises(UserError, match=r"evaluation.tasks.loss.max_rows=0 is below 1"):
        made(ROWS, max_rows=0)
