"""What a reply shares with other texts: earlier replies of the run, and evaluation files."""

import json
from collections.abc import Iterable, Iterator

from smolpost.chat.render import text_of
from smolpost.data.hygiene import CONTAMINATED, NEAR_WORDS, REMOVED, check_installed, features
from smolpost.data.overlap import SignatureIndex, signature_of, words_of
from smolpost.errors import UserError
from smolpost.schema import Hygiene
from smolpost.synthesis.filters.form import PASSED
from smolpost.synthesis.records import Message, Outcome, Sample, Verdict

PERMUTATIONS = 128
SHORTEST_REPLY = 20  # words; shorter ones are often right answers to several prompts


def uncontaminated(sample: Sample, against: list[str], ngram: int) -> Verdict:
    """No turn of user or teacher, reasoning included, shares ngram words in a row with a file: "contaminated".

    As `data.hygiene` finds it for mixtures. Brown et al. 2020 (arXiv:2005.14165, appendix C) take 13 words.

    Args:
        against: Evaluation files, as `data.hygiene.HygieneFilter` has checked them. Each process reads them once.
    """
    turns = [{"role": message["role"], "content": _text(message)} for message in sample.messages]
    is_found = features({"messages": turns}, Hygiene(against=against, ngram=ngram))[:1] == REMOVED
    return Verdict(False, CONTAMINATED) if is_found else PASSED


def _text(message: Message) -> str:
    """All that a turn says, calls as they came: a teacher's arguments may be no JSON."""
    calls = message.get("tool_calls")
    texts = (message.get("reasoning_content"), text_of(message.get("content")), json.dumps(calls) if calls else "")
    return "\n".join(text for text in texts if text)


class EarlierReplies:
    """The replies that became rows so far, and whether a new one is nearly one of them.

    Each reply kept costs about 800 bytes. The first of a group stays, so the order of the replies matters.

    Args:
        near: Least similarity (Jaccard index of word 5-grams, by MinHash) of near duplicates, in (0, 1].
        key: Of the filters in the recipe, for messages.
    Raises:
        UserError: near is out of range, or datasketch is not installed.
    """

    def __init__(self, near: float, key: str):
        if not 0 < near <= 1:
            raise UserError(f"{key}.near={near} is outside (0, 1]; use a similarity such as 0.8")
        check_installed("datasketch", f"{key}.near={near}")
        self.index = SignatureIndex(PERMUTATIONS, near)

    def verdict(self, text: str) -> Verdict:
        """The text is new, and is kept; "near_duplicate" otherwise, with the similarity as score.

        Texts of fewer than SHORTEST_REPLY words are new.
        """
        words = words_of(text)
        if len(words) < SHORTEST_REPLY:
            return PASSED
        similar = self.index.add(signature_of(words, NEAR_WORDS, PERMUTATIONS))
        return Verdict(False, "near_duplicate", similar[1]) if similar else PASSED


def without_near_duplicates(outcomes: Iterable[Outcome], near: float, key: str) -> Iterator[Outcome]:
    """The outcomes; a row whose new turns nearly equal those of an earlier row becomes the reason "near_duplicate".

    Args: As `EarlierReplies`.
    """
    earlier = EarlierReplies(near, key)
    for outcome in outcomes:
        if outcome.row is None:
            yield outcome
            continue
        verdict = earlier.verdict(_new_turns(outcome))
        outcome = outcome._replace(verdicts={**outcome.verdicts, "near": verdict})
        yield outcome if verdict.passed else outcome._replace(row=None, reason=verdict.reason)


def _new_turns(outcome: Outcome) -> str:
    """Text of the assistant turns that the prompt's row does not have; of a pair, those of the chosen side."""
    given = _assistant_turns(outcome.prompt.row)
    return "\n".join(turn for turn in _assistant_turns(outcome.row) if turn not in given)


def _assistant_turns(row: dict) -> list[str]:
    messages = row.get("messages") or row.get("chosen") or []
    return [text_of(message.get("content")) for message in messages if message.get("role") == "assistant"]
