"""Preference pairs of two servers: replies without text, calls of tools."""

from types import SimpleNamespace

import pytest

from smolpost.data.rows import Row
from smolpost.data.validate import validate_row
from smolpost.synthesis.jobs.preference_pairs import PreferencePairs
from smolpost.synthesis.records import Reply
from smolpost.synthesis.settings import Filters, Teacher
from tests.synthesis.jobs import in_mixture, outcomes_of, row

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}]


def pair(chosen: Reply, rejected: Reply, thinking: bool, **more):
    settings = SimpleNamespace(
        chosen=Teacher(model="big", thinking=thinking), rejected=Teacher(model="small", thinking=thinking),
        keep="different", max_similarity=None, suffix="_pairs", filters=Filters(), seed=0,
    )  # fmt: skip
    job = PreferencePairs(settings, in_mixture([row("1+1?", **more)]))
    [outcome] = outcomes_of(job, chosen=lambda _: chosen, rejected=lambda _: rejected)
    return outcome


def calls(argument: str) -> list[dict]:
    return [{"id": "1", "type": "function", "function": {"name": "f", "arguments": f'{{"a": "{argument}"}}'}}]


@pytest.mark.parametrize(
    ("thinking", "rejected", "reason"),
    [
        (False, Reply("", None, "stop"), "rejected_empty"),
        (False, Reply(" \n", None, "stop"), "rejected_empty"),
        (False, Reply("", "hm", "length", closed=False), "rejected_empty"),  # its reasoning is not shown in this mode
        (True, Reply("", "hm", "length", closed=False), ""),
        (True, Reply("", "hm", "stop"), ""),
        (False, Reply("3", None, "length"), ""),
    ],
)
def test_a_rejected_reply_may_be_bad_but_not_empty(thinking, rejected, reason):
    outcome = pair(Reply("2", "one and one" if thinking else None, "stop"), rejected, thinking)
    assert outcome.reason == reason
    if not reason:
        assert validate_row(Row(outcome.row, "made", 1), "made:1") == "preference"


def test_calls_make_the_difference():
    chosen, rejected = (Reply("", None, "tool_calls", tool_calls=calls(text)) for text in ("x", "y"))
    outcome = pair(chosen, rejected, False, tools=TOOLS)
    assert outcome.reason == "" and outcome.row["chosen"][-1]["tool_calls"] == calls("x")
    assert pair(chosen, chosen, False, tools=TOOLS).reason == "identical"
