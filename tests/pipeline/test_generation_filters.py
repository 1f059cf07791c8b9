"""Filters in a stage: labels, near duplicates, length bias, and settings that cannot work."""

import pytest

from smolpost.errors import UserError
from smolpost.synthesis.records import Reply
from tests.synthesis.generated import Generated

TEACHER = "teacher: {model: big, url: http://localhost:1/v1}"


def numbered(number):
    """Rows that ask for 2i."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i} {i}"},
                {"role": "assistant", "content": f"The answer is {2 * i}."},
            ],
            "source": "sums",
        }
        for i in range(number)
    ]


def solve(request):
    """The right answer, boxed, for even numbers; the one after it for odd ones, with the length of its thought."""
    number = int(request.messages[-1]["content"].split()[0])
    wrong = number % 2
    thought = " ".join(f"w{number}x{i}" for i in range(30))
    return Reply(f"It is \\boxed{{{2 * number + wrong}}}.", thought, "stop", completion_tokens=300 if wrong else 100)


@pytest.fixture
def traces(tmp_path, monkeypatch):
    return lambda rows, **replies: Generated(tmp_path, monkeypatch, "reasoning_traces", rows, TEACHER, **replies)


def test_a_label_keeps_all_rows_and_keep_drops_the_wrong_ones_and_says_what_that_does_to_lengths(traces, capsys):
    stage = traces(numbered(100), teacher=solve)
    rows, report = stage.made("stages.made.filters.answer=label")
    assert len(rows) == 100 and report["lengths"]["answers"] == {"labelled": 100, "right": 0.5}
    assert "the filters favour" not in capsys.readouterr().out
    rows, report = stage.made("stages.made.filters.answer=keep")
    assert (len(rows), report["filtered"]) == (50, {"wrong_answer": 50})
    teacher = report["lengths"]["replies"]["teacher"]
    assert (teacher["accepted"]["mean"], teacher["dropped"]["mean"]) == (100, 300)
    assert (
        "teacher: accepted replies have 100 tokens on average and dropped ones 300: the filters favour short replies\n"
    ) in capsys.readouterr().out
    card = (stage.make("stages.made.filters.answer=keep") / "README.md").read_text()
    assert "| teacher | dropped | 50 | 300 |" in card
    assert len(stage.asked()) == 100


def test_near_duplicates_of_earlier_rows_are_filtered(traces):
    pytest.importorskip("datasketch")

    def same_thought(request):
        return solve(request)._replace(reasoning=" ".join(f"w{i}" for i in range(60)))

    rows, report = traces(numbered(6), teacher=same_thought).made("stages.made.filters.near=0.8")
    assert (len(rows), report["filtered"]) == (1, {"near_duplicate": 5})


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("min_tokens=9", r"stages.made.filters.min_tokens=9 is above max_tokens=8, so no reply would pass"),
        ("against=[none.jsonl]", r"stages.made.filters.against\[0\]=none.jsonl is not a file"),
    ],
)
def test_filters_that_cannot_work_are_refused_before_a_teacher_is_asked(traces, word, line):
    stage = traces(numbered(2), teacher=solve)
    with pytest.raises(UserError, match=line):
        stage.make(f"stages.made.filters.{word}", "stages.made.filters.max_tokens=8")
    assert stage.asked() == []
