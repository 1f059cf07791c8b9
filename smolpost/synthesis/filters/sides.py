"""Whether the two sides of a preference pair differ enough to learn from."""

import unicodedata
from collections.abc import Callable, Mapping

from smolpost.chat.reasoning import split_reasoning
from smolpost.synthesis.filters.form import PASSED
from smolpost.synthesis.records import Verdict

SIDES = ("chosen", "rejected")
#: What a pair's two answers have to be -> the sides that have to be right and wrong.
KEEP = {"different": (), "chosen_right": ("chosen",), "right_and_wrong": SIDES}


def different(chosen: str, rejected: str) -> Verdict:
    """The sides differ by more than Unicode form (NFC) and white space; "identical" otherwise.

    Args:
        chosen, rejected: Replies with their reasoning, or both conversations as the chat template shows them.
    """
    same = _folded(chosen) == _folded(rejected)
    return Verdict(not same, "identical" if same else "")


def dissimilar(chosen: str, rejected: str, max_similarity: float) -> Verdict:
    """The sides differ in more than a few words; "too_similar" otherwise.

    Args:
        max_similarity: In (0, 1]; pairs from it on do not pass.
    Returns:
        Score: rapidfuzz's ratio over words, 2M / T for M words in common in their order and T in both; 0 for ratios
        that are clearly below max_similarity, which end early.
    """
    from rapidfuzz.distance import Indel

    # Words instead of characters, as time grows with the product of the lengths.
    words = chosen.split(), rejected.split()
    total = sum(map(len, words))
    similarity = Indel.similarity(*words, score_cutoff=int(max_similarity * total)) / total if total else 1.0
    is_fault = similarity >= max_similarity
    return Verdict(not is_fault, "too_similar" if is_fault else "", similarity)


def answers_as_kept(
    keep: str, chosen: str, rejected: str, reference: str, verify: Callable[[str, str], Verdict]
) -> Verdict:
    """The answers are right and wrong as `keep` says: "no_reference", "chosen_wrong", "rejected_right", "undecided".

    Args:
        keep: A name in KEEP.
        chosen, rejected: Replies; what follows their reasoning is the answer.
        reference: The right answer; "" where there is none.
        verify: (reference, answer) -> verdict, such as `same_text` or that of `verify_answers`.
    """
    for side in KEEP[keep]:
        answer = split_reasoning(chosen if side == "chosen" else rejected)[1]
        verdict = verify(reference, answer)
        if verdict.reason in ("no_reference", "undecided"):
            return verdict
        if side == "chosen" and not verdict.passed:
            return Verdict(False, "chosen_wrong", verdict.score)
        if side == "rejected" and verdict.passed:
            return Verdict(False, "rejected_right", verdict.score)
    return PASSED


def same_text(reference: str, answer: str) -> Verdict:
    """The answer is the reference, letter by letter: "no_reference", "wrong_answer"."""
    if not reference.strip():
        return Verdict(False, "no_reference")
    same = reference.strip() == answer.strip()
    return Verdict(same, "" if same else "wrong_answer", float(same))


def margin(scores: Mapping[str, float], min_margin: float) -> Verdict:
    """A judge prefers the chosen side by min_margin or more; "margin" otherwise. Score: chosen minus rejected.

    Args:
        scores: Side -> the judge's score.
    """
    difference = scores["chosen"] - scores["rejected"]
    return Verdict(difference >= min_margin, "" if difference >= min_margin else "margin", difference)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
