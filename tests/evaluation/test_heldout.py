"""Held-out loss equals transformers'; accuracy counts what a rigged model gets right."""

import re

import pytest
import torch

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode
from smolpost.data.rows import Row
from smolpost.errors import UserError
from smolpost.evaluation import heldout

TODAY = "08 July 2025"


def conversation(question, answer, thinking=None, **kwargs):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if thinking is not None:
        kwargs["enable_thinking"] = thinking
    return {"messages": messages, "chat_template_kwargs": kwargs, "source": "sums"}


ROWS = [
    conversation("1+1?", "<think>\none more\n</think>\n2", True),
    conversation("2+2?", "4", False),
    conversation("3+3?", "<think>\nthree, then three more of them\n</think>\n6"),
    conversation("4+4?", "it is 8", False, custom_instructions="Be polite."),
    conversation("5+5?", "10", None),
    {**conversation("6+6?", "12"), "chat_template_kwargs": None},
]
THINK, NO_THINK = [0, 2, 4, 5], [1, 3]


# ---------------------------------------------------------------- loss


def reference_loss(model, tokenizer, rows):
    """(nats per trained token, tokens) by transformers' own loss, row by row."""
    nats, num_tokens = 0.0, 0
    for row in rows:
        ids, fates, _ = encode(tokenizer, row["messages"], template_kwargs=row["chat_template_kwargs"], today=TODAY)
        trained = [fate == Fate.TRAINED for fate in fates]
        labels = [token if mine else -100 for token, mine in zip(ids, trained, strict=True)]
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        nats, num_tokens = nats + loss * sum(trained), num_tokens + sum(trained)
    return nats / num_tokens, num_tokens


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_loss_is_transformers_loss(model, tokenizer, batch_size):
    result = heldout.heldout_loss(model, tokenizer, ROWS, today=TODAY, batch_size=batch_size, max_rows=100)
    for mode, rows in (("think", THINK), ("no_think", NO_THINK)):
        loss, num_tokens = reference_loss(model, tokenizer, [ROWS[i] for i in rows])
        assert result[mode]["loss"] == pytest.approx(loss, rel=1e-5)
        assert (result[mode]["tokens"], result[mode]["rows"]) == (num_tokens, len(rows))


def test_the_limit_is_per_mode_and_takes_the_first_rows(model, tokenizer):
    result = heldout.heldout_loss(model, tokenizer, ROWS, today=TODAY, batch_size=2, max_rows=2)
    assert result["think"]["loss"] == pytest.approx(reference_loss(model, tokenizer, [ROWS[0], ROWS[2]])[0], rel=1e-5)
    assert [result[mode]["rows"] for mode in ("think", "no_think")] == [2, 2]


def test_a_mode_without_rows_has_no_loss(model, tokenizer):
    result = heldout.heldout_loss(model, tokenizer, ROWS[:1], today=TODAY, batch_size=2, max_rows=2)
    assert result["no_think"] == {"loss": None, "tokens": 0, "rows": 0}


def test_the_head_sees_trained_positions_only(model, tokenizer, monkeypatch):
    seen, score = [], heldout.token_scores

    def counted(hidden, *rest, **more):
        seen.append(len(hidden))
        return score(hidden, *rest, **more)

    monkeypatch.setattr(heldout, "token_scores", counted)
    result = heldout.heldout_loss(model, tokenizer, ROWS, today=TODAY, batch_size=50, max_rows=100)
    assert seen == [result["think"]["tokens"], result["no_think"]["tokens"]]


def test_training_mode_comes_back(model, tokenizer):
    model.train()
    heldout.heldout_loss(model, tokenizer, ROWS, today=TODAY, batch_size=2, max_rows=2)
    assert model.training


def test_a_row_without_messages_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="a row of source 'web': has no messages but the columns text, source"):
        rows = [{"text": "once", "source": "web"}]
        heldout.heldout_loss(model, tokenizer, rows, today=TODAY, batch_size=2, max_rows=2)


def test_a_row_that_the_template_refuses_is_named(model, tokenizer):
    row = Row(conversation("1+1?", "2", thinking="yes"), "held.jsonl", 7)
    with pytest.raises(UserError, match=r"held.jsonl:7: .*enable_thinking='yes' is not a boolean"):
        heldout.heldout_loss(model, tokenizer, [row], today=TODAY, batch_size=2, max_rows=2)
    row = Row({**ROWS[0], "messages": [{"role": "alien", "content": "x"}, *ROWS[0]["messages"]]}, "held.jsonl", 8)
    with pytest.raises(UserError, match=r"held.jsonl:8: messages\[0\].role=alien"):
        ask(model, tokenizer, [row])


def test_a_loss_that_is_not_finite_is_an_error(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="held-out loss of think rows is nan"):
        heldout.heldout_loss(model, tokenizer, ROWS, today=TODAY, batch_size=2, max_rows=2)


# ---------------------------------------------------------------- accuracy


def ask(model, tokenizer, rows=ROWS, **changes):
    options = dict(today=TODAY, answer_pattern=r"(\d+)", max_new_tokens=64, batch_size=2, max_rows=100)
    return heldout.accuracy(model, tokenizer, rows, **{**options, **changes})


def solve(prompt):
    first, second = re.search(r"(\d)\+(\d)\?", prompt).groups()
    return str(int(first) + int(second))


def in_think_mode(prompt):
    return prompt.endswith("<|im_start|>assistant\n")


def test_a_model_that_is_always_right_scores_one_in_both_modes(rig, tokenizer):
    model = rig(lambda prompt: ("<think>\nis it 99?\n</think>\n" if in_think_mode(prompt) else "") + solve(prompt))
    assert ask(model, tokenizer) == {
        "think": 1.0,
        "no_think": 1.0,
        "cut": {"think": 0.0, "no_think": 0.0},
        "prompts": 6,
        "unscored": 0,
    }
    assert [in_think_mode(prompt) for prompt in model.prompts] == [True] * 6 + [False] * 6
    assert sum("Be polite." in prompt for prompt in model.prompts) == 2
    assert all("Today Date: 08 July 2025" in prompt for prompt in model.prompts)


def test_right_answers_count_in_their_mode_only(rig, tokenizer):
    model = rig(lambda prompt: solve(prompt) if in_think_mode(prompt) or "2+2" in prompt else "no idea")
    result = ask(model, tokenizer)
    assert (result["think"], result["no_think"]) == (1.0, pytest.approx(1 / 6))


def test_an_answer_inside_the_think_block_does_not_count(rig, tokenizer):
    assert ask(rig(lambda prompt: f"<think>\n{solve(prompt)}"), tokenizer)["think"] == 0.0


def test_cut_replies_are_counted(rig, tokenizer):
    model = rig(lambda prompt: "very " * 20 * in_think_mode(prompt) + solve(prompt))
    result = ask(model, tokenizer)
    assert result["cut"] == {"think": 1.0, "no_think": 0.0}
    assert (result["think"], result["no_think"]) == (0.0, 1.0)


def test_the_prompt_ends_before_the_last_assistant_turn(rig, tokenizer):
    turns = ("user", "3+4?"), ("assistant", "7"), ("user", "1+4?"), ("assistant", "5"), ("user", "thanks")
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    model = rig(lambda prompt: solve(prompt.split("<|im_start|>")[-2]))
    assert ask(model, tokenizer, [row])["no_think"] == 1.0
    assert "3+4?" in model.prompts[0] and "thanks" not in model.prompts[0]


def test_rows_without_an_answer_are_passed_over_and_counted(rig, tokenizer):
    calls = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    rows = [{"messages": calls}, conversation("hi", "hello"), *ROWS]
    result = ask(rig(solve), tokenizer, rows, max_rows=2)
    assert (result["prompts"], result["unscored"], result["think"]) == (2, 2, 1.0)
    assert ask(rig(solve), tokenizer, rows[:2])["think"] is None


def test_the_default_pattern_takes_the_whole_answer():
    # `.*` also matches the empty string at the end of any text, which is the last match of all.
    assert heldout.final_answer("<think>\na\n</think>\n b\nc \n", re.compile(r"(?s)(.*)")) == "b\nc"


def test_the_last_match_and_its_first_group_count():
    assert heldout.final_answer("it is 3, no: 4 apples", re.compile(r"(\d) ?(apples)?")) == "4"
    assert heldout.final_answer("none", re.compile(r"(\d)")) == ""


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", r"evaluation.answer_pattern='\(' is not a regular expression"), (".*", "has no group to hold the answer")],
)
def test_a_bad_pattern_is_refused(rig, tokenizer, pattern, message):
    with pytest.raises(UserError, match=message):
        ask(rig(solve), tokenizer, answer_pattern=pattern)
