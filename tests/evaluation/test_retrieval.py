"""Contexts are filled to the token, rigged models score what they know, infeasible settings are named."""

import re

import numpy as np
import pytest

from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data.tasks import needle_row
from smolpost.errors import UserError
from smolpost.evaluation.retrieval import retrieval, share_of_pairs
from smolpost.schema import Retrieval

HEADERS = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n"


@pytest.fixture(scope="session")
def bpe():
    texts = [needle_row(np.random.default_rng(i), num_fillers=9, pairs=8, queries=1) for i in range(20)]
    texts = [row["messages"][1]["content"] for row in texts]
    return build_tokenizer(texts, kind="bpe", vocab_size=600, template="smollm3")


def run(model, tokenizer, seed=0, **spec):
    return retrieval(model, tokenizer, Retrieval(**spec), today="08 July 2025", seed=seed, batch_size=3)


def read_symbols(prompt):
    """Answer a symbols prompt by reading it."""
    context, asked = re.search(r"user\n(.*)\?([A-Z]+)<", prompt).groups()
    values = dict(re.findall(r"#([A-Z])([a-z])", context))
    return "".join(key + values[key] for key in asked)


def read_sentences(prompt):
    """Answer a sentences prompt by reading it."""
    *context, question = prompt.split("What")
    codes = dict(re.findall(r"The access code for (\w+) is (\d+)\.", context[0]))
    return "I found " + ", ".join(codes[city] for city in re.findall(r"[A-Z]\w+", question) if city in codes) + "!"


# ---------------------------------------------------------------- symbols


def test_symbols_fill_the_length_to_the_token(rig, tokenizer):
    model = rig(read_symbols)
    # 300 is above the rigged model's max_position_embeddings of 128, and reported all the same.
    result = run(model, tokenizer, style="symbols", lengths=[64, 97, 300], num_prompts=4, pairs=5, queries=3)
    answer = 2 * 3 + 1
    assert result == {n: {"found": 1.0, "prompt_tokens": n - answer} for n in (64, 97, 300)}
    lengths = [len(tokenizer.encode(prompt)) + answer for prompt in model.prompts]
    assert lengths == [64] * 4 + [97] * 4 + [300] * 4
    assert all(prompt.endswith("<think>\n\n</think>\n") and "system" not in prompt for prompt in model.prompts)
    assert len(set(model.prompts)) == 12


def test_the_shortest_length_holds_its_pairs_and_nothing_else(rig, tokenizer):
    least = len(tokenizer.encode(HEADERS)) + 5 * 3 + 1 + 3 + (2 * 3 + 1)
    spec = dict(style="symbols", num_prompts=2, pairs=5, queries=3)
    model = rig(read_symbols)
    assert run(model, tokenizer, lengths=[least], **spec)[least]["found"] == 1.0
    assert not re.search(r"user\n.*\d.*<\|im_end", model.prompts[0])
    with pytest.raises(UserError, match=rf"evaluation.retrieval.lengths={least - 1} is too short.*use {least} or more"):
        run(model, tokenizer, lengths=[300, least - 1], **spec)


def test_longer_prompts_come_in_smaller_batches(rig, tokenizer):
    model, calls = rig(read_symbols), []
    generate = model.generate
    model.generate = lambda input_ids, **options: calls.append(len(input_ids)) or generate(input_ids, **options)
    run(model, tokenizer, style="symbols", lengths=[60, 90, 600], num_prompts=4, pairs=5, queries=2)
    assert calls == [3, 1, 2, 2, 1, 1, 1, 1]


def test_symbols_are_scored_by_the_pairs_in_the_reply(rig, tokenizer):
    spec = dict(style="symbols", lengths=[64], num_prompts=4, pairs=5, queries=2)

    def score(spoil):
        return run(rig(lambda prompt: spoil(read_symbols(prompt))), tokenizer, **spec)[64]["found"]

    assert score(lambda reply: reply) == 1.0
    assert score(lambda reply: reply[:3] + "0") == 0.5
    assert score(lambda reply: reply[2:] + reply[:2]) == 1.0
    assert score(lambda reply: reply[:2]) == 0.5
    assert score(lambda reply: "<think>\nhm\n</think>\n" + reply) == 0.0  # cut: there is room for the answer alone
    assert score(lambda reply: "") == 0.0


def test_asked_keys_are_distinct(rig, tokenizer):
    prompts = []
    read = lambda prompt: prompts.append(prompt) or read_symbols(prompt)  # noqa: E731
    run(rig(read), tokenizer, style="symbols", lengths=[96], num_prompts=20, pairs=8, queries=8)
    assert len(prompts) == 20
    for prompt in prompts:
        asked = prompt.rpartition("?")[2][:8]
        assert len(set(asked)) == 8


def test_share_of_pairs_by_hand():
    row = {"messages": [{"role": "assistant", "content": "AxByCzDw"}]}
    assert share_of_pairs("AxByCzDw", row) == 1.0
    assert share_of_pairs("DwAx and more", row) == 0.5
    assert share_of_pairs("AyBxCwDz", row) == 0.0


def test_the_seed_decides_the_prompts(rig, tokenizer):
    first, same, other = rig(read_symbols), rig(read_symbols), rig(read_symbols)
    spec = dict(style="symbols", lengths=[64], num_prompts=2, pairs=5, queries=2)
    run(first, tokenizer, **spec)
    run(same, tokenizer, **spec)
    run(other, tokenizer, seed=1, **spec)
    assert first.prompts == same.prompts
    assert not set(first.prompts) & set(other.prompts)


# ---------------------------------------------------------------- sentences


@pytest.mark.parametrize("queries", [1, 3])
def test_sentences_fill_the_length_within_one_filler(rig, bpe, queries):
    model = rig(read_sentences)
    model.tokenizer = bpe
    result = run(model, bpe, style="sentences", lengths=[400, 1500], num_prompts=3, pairs=4, queries=queries)
    assert [at["found"] for at in result.values()] == [1.0, 1.0]
    # One more filler would not fit; another place of a needle may cost a token or two.
    longest = max(len(bpe.encode(" " + s)) for s in re.findall(r"[^.]+\.", " ".join(model.prompts)) if "code" not in s)
    for prompt, length in zip(model.prompts, [400] * 3 + [1500] * 3, strict=True):
        answer = ", ".join(re.findall(r"\d+", read_sentences(prompt)))
        num_tokens = len(bpe.encode(prompt)) + len(bpe.encode(answer)) + 1
        assert length - longest - 5 < num_tokens <= length


def test_a_code_counts_wherever_it_stands(rig, bpe):
    model = rig(lambda prompt: read_sentences(prompt).split(",")[0])
    model.tokenizer = bpe
    result = run(model, bpe, style="sentences", lengths=[400], num_prompts=3, pairs=4, queries=2)
    assert result[400]["found"] == 0.5


def test_the_shortest_length_of_sentences_is_computed_for_the_tokenizer(rig, bpe):
    spec = dict(style="sentences", num_prompts=3, pairs=4, queries=1)
    with pytest.raises(UserError, match="is too short for 4 pairs and 1 queries") as caught:
        run(rig(read_sentences), bpe, lengths=[10], **spec)
    least = int(re.search(r"use (\d+) or more", str(caught.value)).group(1))
    model = rig(read_sentences)
    model.tokenizer = bpe
    assert run(model, bpe, lengths=[least], **spec)[least]["found"] == 1.0
    with pytest.raises(UserError, match=f"lengths={least - 1} is too short"):
        run(rig(read_sentences), bpe, lengths=[least - 1], **spec)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(style="poems"), "style=poems is unknown; use symbols or sentences"),
        (dict(lengths=[]), "lengths is empty"),
        (dict(pairs=41), "pairs=41 is above 40 of style sentences"),
        (dict(style="symbols", pairs=27), "pairs=27 is above 26 of style symbols"),
        (dict(pairs=2, queries=3), "queries=3 is above 2"),
        (dict(num_prompts=0), "num_prompts=0 is below 1"),
    ],
)
def test_settings_out_of_range_are_refused(rig, tokenizer, changes, message):
    with pytest.raises(UserError, match=f"evaluation.retrieval.{message}"):
        run(rig(read_symbols), tokenizer, **changes)
