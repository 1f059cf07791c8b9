"""A pair teaches only if its sides differ, and as the setting `keep` says in whether they are right."""

import time

import pytest

from smolpost.synthesis.filters import first_fault, of_side
from smolpost.synthesis.filters.answer_workers import verify_answers
from smolpost.synthesis.filters.sides import answers_as_kept, different, dissimilar, margin, same_text
from smolpost.synthesis.records import Verdict

PASSED = Verdict(True)


@pytest.mark.parametrize(
    ("chosen", "rejected", "fault"),
    [
        ("a b", "a b", "identical"),
        ("a  b\n", "a b", "identical"),
        ("\u00e9", "e\u0301", "identical"),
        ("A", "a", ""),
        ("<think>\nx\n</think>\n4", "4", ""),
        ("", "", "identical"),
    ],
)
def test_sides_differ_by_more_than_white_space(chosen, rejected, fault):
    assert different(chosen, rejected) == Verdict(not fault, fault)


def test_similarity_is_the_share_of_common_words_and_the_limit_itself_does_not_pass():
    chosen, rejected = "one two three four five", "one two 3 four five"  # 4 of 5 words: 2 * 4 / 10
    assert dissimilar(chosen, rejected, 0.8) == Verdict(False, "too_similar", 0.8)
    assert dissimilar(chosen, rejected, 0.81) == Verdict(True, "", 0.8)
    assert (
        dissimilar("a", "a", 1.0).reason == dissimilar("", "", 1.0).reason == "too_similar"
        and dissimilar("", "a", 0.5).passed
    )


@pytest.mark.parametrize(
    ("keep", "chosen", "rejected", "reference", "fault"),
    [
        ("different", "5", "6", "", ""),
        ("chosen_right", "4", "5", "4", ""),
        ("chosen_right", "4", "4", "4", ""),
        ("chosen_right", "5", "6", "4", "chosen_wrong"),
        ("chosen_right", "4", "5", "", "no_reference"),
        ("right_and_wrong", "4", "5", "4", ""),
        ("right_and_wrong", "4", "4", "4", "rejected_right"),
        ("right_and_wrong", "5", "4", "4", "chosen_wrong"),
        ("right_and_wrong", "<think>\n5\n</think>\n4", "<think>\n4\n</think>\n5", "4", ""),  # reasoning does not count
        ("right_and_wrong", "4", "<think>\n4", "4", ""),  # a cut block has no answer
    ],
)
@pytest.mark.parametrize("verify", [same_text, lambda reference, answer: verify_answers([(reference, answer)])[0]])
def test_answers_are_right_and_wrong_as_kept(keep, chosen, rejected, reference, fault, verify):
    assert answers_as_kept(keep, chosen, rejected, reference, verify).reason == fault


def test_what_cannot_be_decided_is_neither_right_nor_wrong():
    undecided = Verdict(False, "undecided")
    assert answers_as_kept("right_and_wrong", "4", "5", "4", lambda *pair: undecided) == undecided


def test_equal_text_is_exact_and_mathematics_is_not():
    assert same_text("4", " 4\n").passed and not same_text("4", "4.0").passed
    pytest.importorskip("math_verify")
    assert verify_answers([("4", "4.0")])[0].passed


def test_the_margin_is_chosen_minus_rejected():
    assert margin({"chosen": 8, "rejected": 6}, 2) == Verdict(True, "", 2)
    assert margin({"chosen": 8, "rejected": 6.5}, 2) == Verdict(False, "margin", 1.5)
    assert margin({"chosen": 3, "rejected": 5}, -2).passed


def test_verdicts_of_both_sides_keep_their_order_and_name_the_side():
    verdicts = of_side("chosen", {"finished": Verdict(False, "cut"), "empty": PASSED}) | {"different": PASSED}
    assert verdicts == {
        "chosen.finished": Verdict(False, "chosen_cut"),
        "chosen.empty": PASSED,
        "different": PASSED,
    }
    assert first_fault(verdicts) == "chosen_cut"
    assert first_fault({"a": PASSED, "b": Verdict(False, "b1"), "c": Verdict(False, "c1")}) == "b1"
    assert first_fault({}) == first_fault(of_side("chosen", {"answer_label": Verdict(False, "wrong_answer")})) == ""


def test_long_sides_are_compared_in_seconds():
    words = [str(i) for i in range(30_000)]  # 170 kB, a reply of 32,768 tokens
    changed = [word if i % 10 else "x" for i, word in enumerate(words)]
    start = time.process_time()
    assert dissimilar(" ".join(words), " ".join(changed), 0.9) == Verdict(False, "too_similar", 0.9)
    assert dissimilar(" ".join(words), " ".join(reversed(words)), 0.9).passed
    assert time.process_time() - start < 5
