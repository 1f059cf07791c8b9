"""rejection_samples: which of several replies stays, and the pass rates."""

from types import SimpleNamespace

import pytest

from smolpost.synthesis.jobs.rejection_samples import RejectionSamples
from smolpost.synthesis.records import Reply
from smolpost.synthesis.settings import Filters, Teacher
from tests.synthesis.jobs import in_mixture, outcomes_of, row

ROWS = [row("2+2?", "#### 4", id="two"), row("3+3?", "#### 6", id="three", source="hard")]


def job(**settings):
    given = dict(
        teacher=Teacher(model="big"), num_samples=4, keep="first_right", suffix="_v",
        filters=Filters(answer="keep"), seed=0,
    )  # fmt: skip
    return RejectionSamples(SimpleNamespace(**given | settings), in_mixture(ROWS))


def replies():
    """To the first prompt wrong, right and long, right and short, right; to the second all wrong."""
    given = iter(["so 5", "so surely 4", "4", "exactly 4", *["9"] * 4])

    def reply(request):
        text = f"The answer is {next(given)}."
        return Reply(text, None, "stop", completion_tokens=len(text))

    return reply


@pytest.mark.parametrize(("keep", "text"), [("first_right", "so surely 4"), ("shortest_right", "4")])
def test_one_of_the_right_replies_stays(keep, text):
    asked = job(keep=keep)
    right, wrong = outcomes_of(asked, teacher=replies())
    assert right.row["messages"][-1]["content"] == f"The answer is {text}."
    assert (wrong.row, wrong.reason) == (None, "none_right")
    assert asked.report() == {
        "num_samples": 4,
        "pass": {
            "sums": {"prompts": 1, "pass@1": 0.75, "pass@4": 1.0},
            "hard": {"prompts": 1, "pass@1": 0.0, "pass@4": 0.0},
        },
    }
    assert asked.lines() == ["sums: pass@1 75.0%, pass@4 100.0%", "hard: pass@1 0.0%, pass@4 0.0%"]


def test_a_random_one_is_right_and_the_same_each_time():
    picked = [outcomes_of(job(keep="random_right", seed=s), teacher=replies())[0].row for s in (0, 0, *range(1, 9))]
    assert picked[0] == picked[1]
    texts = {found["messages"][-1]["content"] for found in picked}
    assert 1 < len(texts) <= 3 and "The answer is so 5." not in texts


def test_all_right_replies_become_rows_with_ids_of_their_own():
    asked = job(keep="all_right")
    assert asked.rows_per_prompt == 4
    found = outcomes_of(asked, teacher=replies())
    assert [outcome.prompt.id for outcome in found] == [
        f"{name}-{i}" for name in ("two", "three") for i in (1, 2, 3, 4)
    ]
    assert [bool(outcome.row) for outcome in found] == [False, True, True, True, False, False, False, False]
    assert {outcome.reason for outcome in found if not outcome.row} == {"wrong_answer"}
    assert [len(outcome.records["teacher"].samples) for outcome in found] == [1] * 8


def test_samples_are_separate_requests_with_seeds_of_their_own():
    seeds = []

    def reply(request):
        seeds.append(request.seed)
        return Reply("4", None, "stop")

    outcomes_of(job(), teacher=reply)
    assert len(set(seeds)) == len(seeds) == 8


def test_an_earlier_reply_is_not_the_answer_to_the_last_question():
    asked = RejectionSamples(
        SimpleNamespace(teacher=Teacher(model="big"), num_samples=1, keep="first_right", suffix="", seed=0,
                        filters=Filters(answer="keep")),
        [("mine", {"messages": [*row("2+2?", "4")["messages"], {"role": "user", "content": "3+3?"}]})],
    )  # fmt: skip
    [outcome] = outcomes_of(asked, teacher=lambda request: Reply("4", None, "stop"))
    assert outcome.verdicts["answer"].reason == "no_reference"
