"""What a reply answers: think blocks off, then by pattern or as mathematics."""

import json
import re
import threading

import pytest

from smolpost.chat.answers import MathAnswers, PatternAnswers, opens_thinking, parts_of
from smolpost.errors import UserError


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("42", ("", "42", False)),
        ("<think>\nsix sevens\n</think>\n42", ("six sevens", "42", False)),
        ("<think>\nsix sevens are 42", ("six sevens are 42", "", True)),
        ("<think>\na\n</think>\n<think>\nb", ("a\nb", "", True)),
        ("5 <think> is a tag", ("", "5 <think> is a tag", False)),  # not 5
        ("a\n</think>\n42", ("a", "42", False)),  # the opening stood in the prompt
        ("", ("", "", False)),
    ],
)
def test_parts(reply, expected):
    assert parts_of(reply) == expected


def test_a_block_that_the_prompt_opened(char):
    assert parts_of("six sevens are 42", opened_in_prompt=True) == ("six sevens are 42", "", True)
    assert parts_of("six sevens\n</think>\n42", opened_in_prompt=True) == ("six sevens", "42", False)
    assert opens_thinking(char, char.encode("abc<think>\n"))
    assert not opens_thinking(char, char.encode("abc<think>\n\n</think>\n"))


# ---------------------------------------------------------------- pattern


def find(pattern, text):
    return PatternAnswers(pattern, "evaluation.tasks.sums.answer_pattern").find(text)


def test_the_default_pattern_takes_the_whole_answer():
    # `.*` also matches the empty string at the end of any text, which is the last match of all.
    assert find(r"(?s)(.*)", " b\nc \n") == "b\nc"


def test_the_last_match_and_its_first_group_count():
    assert find(r"(\d) ?(apples)?", "it is 3, no: 4 apples") == "4"
    assert find(r"(\d)", "none") == ""
    assert find(r"x(\d)?", "x3 x") == ""


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"^evaluation.tasks.sums.answer_pattern='\(' is not a regular expression"),
        (".*", r"^evaluation.tasks.sums.answer_pattern='.\*' has no group to hold the answer"),
    ],
)
def test_a_bad_pattern_is_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        find(pattern, "")


# ---------------------------------------------------------------- mathematics


@pytest.fixture(scope="module")
def mathematics():
    pytest.importorskip("math_verify", reason="math-verify is not installed (smolpost[eval])")
    return MathAnswers("evaluation.tasks.sums.answer")


@pytest.mark.parametrize(
    ("expected", "reply"),
    [
        ("The answer is 42.", r"so it is \boxed{42}"),
        ("The answer is 1,250.", "1250"),
        ("1250", r"She earned $1,250.00 in all."),
        ("The answer is 18.", r"It costs \$18 dollars."),
        ("The answer is 18.", "**18**"),
        (r"$\frac{1}{2}$", "0.5"),
        ("3/4", r"\boxed{\dfrac{6}{8}}"),
        ("-3", r"$x = -3$"),
        ("$x^2 + 2x + 1$", "$(x+1)^2$"),
    ],
)
def test_equal_values_agree(mathematics, expected, reply):
    assert mathematics.agree(mathematics.find(expected), mathematics.find(reply))


@pytest.mark.parametrize(
    ("expected", "reply"),
    [("42", "41"), ("42", ""), ("42", "no number"), ("1/2", "1/3"), ("3", "-3"), ("5", "5 is not right, it is 6")],
)
def test_other_values_do_not_agree(mathematics, expected, reply):
    assert not mathematics.agree(mathematics.find(expected), mathematics.find(reply))


def test_a_text_without_mathematics_answers_nothing(mathematics):
    assert not mathematics.find("The answer is yes.")
    assert mathematics.shown([]) == ""
    assert mathematics.shown(mathematics.find("so 1,250 it is")) == "1250"


@pytest.mark.slow
def test_what_cannot_be_decided_in_time_does_not_agree(mathematics):
    assert not mathematics.agree(mathematics.find("42"), mathematics.find("$9^{9^{9^{9}}}$"))


def test_another_thread_is_refused_and_never_judged_wrong(mathematics):
    errors = []

    def ask():
        try:
            mathematics.find("42")
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "threaded environment" in errors[0]


def test_every_answer_of_a_file_is_read_alike_by_both(mathematics, rows_file):
    pattern = PatternAnswers(r"The answer is (.*)\.", "key")
    lines = rows_file("sft").read_text().splitlines()[:300]
    for line in lines:
        reply = json.loads(line)["messages"][-1]["content"]
        answer = parts_of(reply).answer
        number = float(re.sub(",", "", pattern.find(answer)))
        assert float(mathematics.find(answer)[0]) == number
        assert not mathematics.agree(mathematics.find(answer), mathematics.find(f"\\boxed{{{number + 1}}}"))


def test_math_without_the_library_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(UserError, match=r"^evaluation.tasks.sums.answer=math needs math-verify.*smolpost\[eval\]"):
        MathAnswers("evaluation.tasks.sums.answer")
