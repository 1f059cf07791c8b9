"""mode_switch: the plan of modes, chains of rows, and what a prepared row trains."""

from collections import Counter
from types import SimpleNamespace

import pytest

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode
from smolpost.chat.reasoning import split_reasoning
from smolpost.chat.render import render
from smolpost.data.rows import Row
from smolpost.data.validate import validate_row
from smolpost.synthesis.jobs.mode_switch import ModeSwitch, chained, modes_of
from smolpost.synthesis.jobs.prompts import prompts_of
from smolpost.synthesis.records import Reply
from smolpost.synthesis.settings import Filters, Teacher
from tests.char_model import char_tokenizer
from tests.synthesis.fakes import thinking_reply
from tests.synthesis.jobs import in_mixture, outcomes_of, row, turns


def job(rows, **settings):
    given = dict(teacher=Teacher(model="big"), turns=3, suffix="_switch", filters=Filters(), seed=0)
    return ModeSwitch(SimpleNamespace(**given | settings), in_mixture(rows))


def test_each_sequence_switches_and_each_turn_thinks_half_the_time():
    for number in (2, 3, 5):
        drawn = [modes_of(number, 0, str(name)) for name in range(4000)]
        assert all(len(set(modes)) == 2 for modes in drawn)
        for turn in range(number):
            assert sum(modes[turn] for modes in drawn) / 4000 == pytest.approx(0.5, abs=0.03)
    assert Counter(map(tuple, drawn)).keys() == {
        tuple(map(bool, map(int, f"{code:05b}"))) for code in range(1, 31)
    }  # all but the two without a switch
    assert modes_of(4, 0, "a") == modes_of(4, 0, "a")


def test_single_questions_of_one_source_become_a_conversation():
    rows = [row(f"{i}?", source="even" if i % 2 == 0 else "odd", id=str(i)) for i in range(11)]
    found = {prompt.source: [] for prompt in prompts_of(in_mixture(rows))}
    for prompt in chained(prompts_of(in_mixture(rows)), 3):
        found[prompt.source].append(prompt.row["rows"])
    assert found == {"even": [["0", "2", "4"], ["6", "8", "10"]], "odd": [["1", "3", "5"], ["7", "9"]]}


def test_rows_with_instructions_of_their_own_are_not_chained_and_every_row_is_accounted_for():
    rows = [
        row("1?", id="1", chat_template_kwargs={"custom_instructions": "Rhyme."}),
        {"messages": [{"role": "system", "content": "s"}, *turns("2?", "x")], "id": "2"},
        {"messages": turns("3?", "x", "4?", "y"), "id": "3"},
        row("5?", id="5"),
    ]
    found = {outcome.prompt.id: outcome for outcome in outcomes_of(job(rows), teacher=thinking_reply)}
    assert {name: outcome.reason for name, outcome in found.items()} == {
        "1": "one_turn", "2": "one_turn", "3": "", "5": "one_turn",
    }  # fmt: skip


def test_a_prepared_row_thinks_exactly_where_its_user_asks_for_it():
    rows = [{"messages": turns(*(f"{i}{part}" for part in ("a", "x", "b", "y", "c", "z", "d", "w")))} for i in range(8)]
    tokenizer = char_tokenizer()
    for outcome in outcomes_of(job(rows), teacher=thinking_reply):
        modes = modes_of(4, 0, outcome.prompt.id)
        assert validate_row(Row(outcome.row, "made", 1), "made:1") == "messages"
        text = render(
            tokenizer,
            outcome.row["messages"],
            template_kwargs=outcome.row["chat_template_kwargs"],
            today="08 July 2025",
        )
        shown = text.split("<|im_start|>")
        users = [turn for turn in shown if turn.startswith("user\n")]
        replies = [turn.removeprefix("assistant\n") for turn in shown if turn.startswith("assistant\n")]
        words = ["/think" if mode else "/no_think" for mode in modes]
        assert [turn.split()[-1].removesuffix("<|im_end|>") for turn in users] == words
        assert [split_reasoning(reply)[0] is not None for reply in replies] == modes
        assert [("<think>" in reply) for reply in replies] == modes
        assert "Reasoning Mode: /think" in text
        encoded = encode(
            tokenizer,
            outcome.row["messages"],
            template_kwargs=outcome.row["chat_template_kwargs"],
            today="08 July 2025",
        )
        trained = [i for i, fate in zip(encoded.input_ids, encoded.fates, strict=True) if fate == Fate.TRAINED]
        said = [turn["content"] for turn in outcome.row["messages"] if turn["role"] == "assistant"]
        assert tokenizer.decode(trained) == "".join(f"{content}<|im_end|>" for content in said)
        assert encoded.thinks and not encoded.lost


def test_the_teacher_is_switched_and_sees_no_words():
    seen = []

    def reply(request):
        seen.append((request.thinking, [turn["content"] for turn in request.messages]))
        return thinking_reply(request)

    [outcome] = outcomes_of(job([{"messages": turns("a /no_think", "x", "b", "y"), "id": "1"}]), teacher=reply)
    assert [thinking for thinking, _ in seen] == modes_of(2, 0, "1")
    assert seen[1][1] == ["a", "You said a", "b"]
    assert outcome.row["source"] == "mine_switch"


def test_a_teacher_that_does_not_switch_is_filtered():
    [outcome] = outcomes_of(job([{"messages": turns("a", "x", "b", "y")}]), teacher=lambda r: Reply("b", "hm", "stop"))
    assert (outcome.row, outcome.reason) == (None, "unasked_thinking")
