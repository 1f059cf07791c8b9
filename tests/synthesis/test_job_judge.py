"""judge: both orders, strict verdicts, margins."""

import re
from types import SimpleNamespace

import pytest

from smolpost.synthesis.jobs.judge import Judge, scores_of
from smolpost.synthesis.records import Reply
from smolpost.synthesis.settings import Teacher
from tests.synthesis.jobs import in_mixture, outcomes_of, row, turns

PAIR = {
    "prompt": "b",
    "chosen": [*turns("a", "x", "b"), {"role": "assistant", "content": "<think>\nsecret\n</think>\nbest"}],
    "rejected": turns("a", "x", "b", "worst"),
    "chat_template_kwargs": {"enable_thinking": True, "custom_instructions": "Be kind."},
    "source": "mine",
}


def job(*rows, **settings):
    given = dict(teacher=Teacher(model="judge"), criteria="Judge {both}.", min_margin=1.0, min_score=7.0, seed=0)
    return Judge(SimpleNamespace(**given | settings), in_mixture(rows))


def judged_by(quality, first_bonus=0):
    """A judge that knows each reply's quality and gives the reply that is shown first something more."""

    def reply(request):
        shown = re.findall(r"\[Reply [AB]\]\n(.*)\n", request.messages[0]["content"])
        scores = [quality[text] + first_bonus * (not i) for i, text in enumerate(shown)]
        names = ", ".join(f"{name}: {score}" for name, score in zip("AB", scores, strict=False))
        return Reply(f"I think so.\n\n**{names}**", None, "stop")

    return reply


def test_both_orders_cancel_the_advantage_of_the_first_place():
    asked = job(PAIR)
    [outcome] = outcomes_of(asked, teacher=judged_by({"best": 6, "worst": 4}, first_bonus=3))
    assert outcome.verdicts["judge"].score == 2.0 and outcome.reason == ""
    assert outcome.row["chosen"] == PAIR["chosen"] and outcome.row["prompt"] == "b"
    assert outcome.row["chat_template_kwargs"]["custom_instructions"] == "Be kind."
    assert asked.report() == {"judged": 1, "orders_agree": 0.0, "first_shown_wins": 1.0}
    assert asked.lines() == ["judge: both orders agree in 0% of 1 pairs; the reply that is shown first wins 100%"]


def test_the_judge_sees_answers_instructions_and_the_conversation():
    seen = []

    def reply(request):
        seen.append(request.messages[0]["content"])
        return Reply("A: 5, B: 5", None, "stop")

    [outcome] = outcomes_of(job(PAIR), teacher=reply)
    assert outcome.reason == "margin" and outcome.verdicts["judge"].score == 0
    assert "secret" not in seen[0] and "Judge {both}." in seen[0]
    assert "[System]\nBe kind.\n\n[User]\na\n\n[Assistant]\nx\n\n[User]\nb\n\n[Reply A]\nbest" in seen[0]
    assert "[Reply A]\nworst\n\n[Reply B]\nbest" in seen[1]


def test_a_reply_alone_is_scored():
    good, bad = outcomes_of(job(row("1+1?", "2"), row("2+2?", "5")), teacher=judged_by({"2": 9, "5": 3}))
    assert good.row["messages"] == row("1+1?", "2")["messages"] and good.verdicts["judge"].score == 9
    assert (bad.row, bad.reason) == (None, "low_score")


@pytest.mark.parametrize(
    "text",
    ["", "A: 5", "A: 5, B: eleven", "A: 0, B: 5", "A: 11, B: 5", "A: 5, B: 5\nas I said", "The scores are A: 5, B: 5",
     "B: 5, A: 5", "A: 5/10, B: 6/10", "A: -5, B: 5", "A: ٥, B: 5"],
)  # fmt: skip
def test_an_unreadable_verdict_is_a_reason(text):
    assert scores_of(Reply(text, None, "stop"), 2) is None
    [outcome] = outcomes_of(job(PAIR), teacher=lambda request: Reply(text, None, "stop"))
    assert (outcome.row, outcome.reason) == (None, "unreadable_verdict")


def test_a_judge_that_repeats_the_question_gives_no_verdict():
    for content in (PAIR, row("1+1?", "2")):
        [outcome] = outcomes_of(
            job(content), teacher=lambda request: Reply(request.messages[-1]["content"], None, "stop")
        )
        assert outcome.reason == "unreadable_verdict"


@pytest.mark.parametrize("text", ["A: 7, B: 2.5", "fine\n A: 7 B: 2.5 ", "`A: 7; B: 2.5`", "**A: 7, B: 2.5**"])
def test_forms_of_a_readable_verdict(text):
    assert scores_of(Reply(text, None, "stop"), 2) == (7.0, 2.5)
