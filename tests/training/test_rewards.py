"""Rewards of sampled replies: values by hand."""

import dataclasses

import pytest

from smolpost.errors import UserError
from smolpost.registry import REWARDS
from smolpost.training.rewards import Reward, Rollout, configured, reward

BASE = Rollout(reply="", reference="", opened=False, num_tokens=10, max_tokens=100, stopped=True)


def value(name, settings=None, **changes):
    return configured(name, settings or {}).value(BASE._replace(**changes))


@pytest.mark.parametrize(
    ("reply", "reference", "expected"),
    [
        ("<think>\n3 x 14\n</think>\n42", "<think>\nsix sevens\n</think>\n42", 1.0),
        ("42", "<think>\nsix sevens\n</think>\n42", 1.0),  # thinking is not part of an answer
        ("<think>\n42", "42", 0.0),  # never answered
        ("41", "42", 0.0),
        ("42", "", None),  # nothing says what is right
    ],
)
def test_right_answer(reply, reference, expected):
    assert value("right_answer", reply=reply, reference=reference) == expected


def test_right_answer_where_the_prompt_opened_the_think_block():
    rollout = {"opened": True, "reference": "six sevens\n</think>\n42"}
    assert value("right_answer", reply="3 x 14\n</think>\n42", **rollout) == 1
    assert value("right_answer", reply="42", **rollout) == 0  # still thinking


def test_right_answer_by_a_pattern_and_as_mathematics():
    pattern = {"answer_pattern": r"answer: (\S+)"}
    words = {"reply": "so the answer: 7", "reference": "answer: 7"}
    assert value("right_answer", pattern, **words) == 1 and value("right_answer", **words) == 0
    fractions = {"reply": r"\boxed{\frac{1}{2}}", "reference": r"\boxed{0.5}"}
    assert value("right_answer", {"answer": "math"}, **fractions) == 1
    with pytest.raises(UserError, match=r"right_answer\.answer_pattern='x' has no group"):
        configured("right_answer", {"answer_pattern": "x"})


@pytest.mark.parametrize(
    ("reply", "reference", "stopped", "expected"),
    [
        ("<think>\na\n</think>\nb", "<think>\nc\n</think>\nd", True, 1),
        ("<think>\na\n</think>\nb", "<think>\nc\n</think>\nd", False, 0),  # ran into the limit
        ("b", "<think>\nc\n</think>\nd", True, 0),
        ("<think>\na\n</think>\nb", "d", True, 0),
        ("<think>\na", "<think>\nc\n</think>\nd", True, 0),  # stopped inside its thoughts
        ("b", "d", True, 1),
        ("<think>\n\n</think>\nb", "d", True, 1),  # an empty block is no thinking
    ],
)
def test_follows_mode(reply, reference, stopped, expected):
    assert value("follows_mode", reply=reply, reference=reference, stopped=stopped) == expected


@pytest.mark.parametrize(("length", "expected"), [(10, 0), (60, 0), (70, -0.25), (80, -0.5), (100, -1)])
def test_soft_overlong_is_equation_13(length, expected):
    assert value("soft_overlong", {"buffer": 40}, num_tokens=length) == expected


def test_a_reward_needs_its_method():
    with pytest.raises(UserError, match="has no method value"):

        @reward("nothing")
        @dataclasses.dataclass
        class Nothing(Reward):
            pass

    assert "nothing" not in REWARDS
