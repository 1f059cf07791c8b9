"""Contexts are filled to the token, pairs count by their depth, infeasible settings are named."""

import re

import numpy as np
import pytest

from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data.tasks import recall_row
from smolpost.errors import UserError
from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Context
from smolpost.evaluation.tasks.recall import Recall, RecallTask
from smolpost.inference.local import LocalEngine
from tests.evaluation.canned import Canned

HEADERS = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n"


def build(seed=0, **config):
    return Recall("recall", RecallTask(**config), Context("8 July 2025", seed, None))


def read(prompt):
    """Answer a prompt by reading it."""
    context, asked = re.search(r"user\n(.*)\?([A-Z]+)<", prompt).groups()
    values = dict(re.findall(r"#([A-Z])([a-z])", context))
    return "".join(key + values[key] for key in asked)


def scores(tokenizer, spoil=lambda reply: reply, **config):
    task = build(**config)
    items = task.items(tokenizer)
    samples = task.measure(Canned(tokenizer, lambda prompt: spoil(read(prompt))), items)
    assert [sample.id for sample in samples] == [item.id for item in items]
    return {name: score["value"] for name, score in aggregate(samples).items()}


def test_prompts_fill_the_length_to_the_token(tokenizer):
    items = build(lengths=[300, 64, 97], num_prompts=4, pairs=5, queries=3).items(tokenizer)
    assert [len(item.ids) + item.max_new_tokens for item in items] == [64] * 4 + [97] * 4 + [300] * 4
    assert {item.max_new_tokens for item in items} == {2 * 3 + 1}
    assert [item.id for item in items[:5]] == ["64/0", "64/1", "64/2", "64/3", "97/0"]
    prompts = [tokenizer.decode(item.ids) for item in items]
    assert len(set(prompts)) == 12
    for prompt in prompts:
        assert prompt.endswith("<think>\n\n</think>\n") and "system" not in prompt
        asked = prompt.rpartition("?")[2][:3]
        assert len(set(asked)) == 3


def test_a_tokenizer_with_merges_is_filled_up_too():
    rows = [recall_row(np.random.default_rng(i), 200, 8, 8)["messages"][1]["content"] for i in range(50)]
    tokenizer = build_tokenizer(rows, kind="bpe", vocab_size=420, template="smollm3")
    items = build(lengths=[128, 400], num_prompts=8, pairs=5, queries=3).items(tokenizer)
    for item, length in zip(items, [128] * 8 + [400] * 8, strict=True):
        assert length - 4 <= len(item.ids) + item.max_new_tokens <= length  # other numbers are drawn at each size
        reply = tokenizer.encode(read(tokenizer.decode(item.ids)))
        assert item.max_new_tokens == len(reply) + 1


def test_the_shortest_length_holds_its_pairs_and_nothing_else(tokenizer):
    least = len(tokenizer.encode(HEADERS)) + 5 * 3 + 1 + 3 + (2 * 3 + 1)
    config = dict(num_prompts=2, pairs=5, queries=3)
    item = build(lengths=[least], **config).items(tokenizer)[0]
    assert not re.search(r"user\n.*\d.*<\|im_end", tokenizer.decode(item.ids))
    message = (
        rf"evaluation.tasks.recall.lengths={least - 1} is too short for 5 pairs and 3 queries.*use {least} or more"
    )
    with pytest.raises(UserError, match=message):
        build(lengths=[300, least - 1], **config).items(tokenizer)


def test_pairs_are_scored_wherever_they_stand_in_the_reply(tokenizer):
    config = dict(lengths=[64], num_prompts=4, pairs=5, queries=2)
    assert scores(tokenizer, **config)["64"] == 1.0
    assert scores(tokenizer, lambda reply: reply[:3] + "0", **config)["64"] == 0.5
    assert scores(tokenizer, lambda reply: reply[2:] + reply[:2], **config)["64"] == 1.0
    assert scores(tokenizer, lambda reply: f"<think>\nhm\n</think>\n{reply[2:]}", **config)["64"] == 0.5
    assert scores(tokenizer, lambda reply: f"<think>\n{reply}", **config)["64"] == 0.0
    assert scores(tokenizer, lambda reply: "", **config)["64"] == 0.0


def test_depths_are_the_places_of_the_asked_pairs(tokenizer):
    """One who sees the first half of a context finds the pairs of the first five tenths, and no others."""

    def read_half(prompt):
        context = re.search(r"user\n(.*)\?", prompt)[1]
        seen = context[: -(-(len(context) - 3) // 2) + 2]
        return "".join(re.findall(r"#([A-Z][a-z])", seen))

    task = build(lengths=[256], num_prompts=40, pairs=8, queries=8)
    items = task.items(tokenizer)
    found = aggregate(task.measure(Canned(tokenizer, read_half), items))
    depths = [f"256/depth_0.{tenth}0" for tenth in range(10)]
    assert set(found) == {"256", *depths}
    assert [found[depth]["value"] for depth in depths] == [1.0] * 5 + [0.0] * 5
    # Equal tenths, in which 320 pairs lie; and a mean over pairs is the mean over their depths, weighted.
    sizes = [sum(s.weights.get(depth, 0) for s in task.measure(Canned(tokenizer, read), items)) for depth in depths]
    assert sum(sizes) == 320 and min(sizes) > 16 and max(sizes) < 50
    assert found["256"]["value"] == pytest.approx(sum(sizes[:5]) / 320)


def test_the_seed_decides_the_prompts_and_other_lengths_do_not(tokenizer):
    config = dict(num_prompts=2, pairs=5, queries=2)

    def ids(items):
        return {item.id: item.ids for item in items}

    first = ids(build(lengths=[64, 80], **config).items(tokenizer))
    assert ids(build(lengths=[80], **config).items(tokenizer)).items() <= first.items()
    other = ids(build(seed=1, lengths=[64, 80], **config).items(tokenizer))
    assert all(first[name] != other[name] for name in first)


def test_replies_of_a_batch_are_those_of_prompts_alone(model, tokenizer):
    task = build(lengths=[64, 90], num_prompts=2, pairs=5, queries=2)
    items = task.items(tokenizer)
    engine = LocalEngine(model, tokenizer)
    alone = [sample for item in items for sample in task.measure(engine, [item])]
    assert task.measure(engine, items) == alone
    assert len({sample.record["reply"] for sample in alone}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lengths=[]), r"lengths=\[\] is not a list"),
        (dict(lengths=[64, 64]), r"lengths=\[64, 64\] is not a list of different lengths"),
        (dict(pairs=27), "pairs=27 is above 26, the number of keys"),
        (dict(pairs=2, queries=3), "queries=3 is above 2, pairs; lower it"),
        (dict(num_prompts=0), "num_prompts=0 is below 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=f"evaluation.tasks.recall.{message}"):
        build(**changes)
