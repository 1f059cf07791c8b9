"""Replies that repeat themselves: the usual way in which sampling goes wrong."""

import numpy as np

from smolpost.data.overlap import gram_hashes, words_of
from smolpost.synthesis.filters.form import PASSED
from smolpost.synthesis.records import Reply, Verdict

GRAM = 8  # words
LOOP_TAIL = 2000  # characters at the end of a text in which a loop is looked for
LOOP_CHARACTERS = 200  # shortest loop
LOOP_TIMES = 4  # fewest times that its period stands in it
LOOP_ANCHOR = 20  # last characters, which recur once in each period


def repetition(reply: Reply, max_repetition: float) -> Verdict:
    """The reply does not repeat itself: "loop" or "repetition". Score: `repeated_share` of reasoning and answer.

    Rae et al. 2021 (arXiv:2112.11446, table A1) remove web pages by the share of text in repeated 5- to 10-grams.

    Args:
        max_repetition: Largest share that stays, in (0, 1].
    """
    texts = [text for text in (reply.reasoning, reply.content) if text]
    share = repeated_share("\n".join(texts))
    fault = "loop" if any(map(ends_in_loop, texts)) else "repetition" if share > max_repetition else ""
    return Verdict(not fault, fault, share) if fault else PASSED._replace(score=share)


def repeated_share(text: str) -> float:
    """Share of a text's word 8-grams that occurred before in it, in [0, 1); 0 for a text of fewer words.

    A character of a script without spaces is a word (`overlap.words_of`).
    """
    grams = gram_hashes(words_of(text), GRAM)
    return 1.0 - len(np.unique(grams)) / len(grams) if len(grams) else 0.0


def ends_in_loop(text: str) -> bool:
    """Whether a text ends with one period over and over, in any script.

    The repeated part has LOOP_CHARACTERS or more and at least LOOP_TIMES periods, which hold letters or digits: a long
    line of dashes is layout.
    """
    tail = text.rstrip()[-LOOP_TAIL:]
    if len(tail) < LOOP_CHARACTERS:
        return False
    anchor = tail[-LOOP_ANCHOR:]
    place = len(tail) - LOOP_ANCHOR
    while (place := tail.rfind(anchor, 0, place + LOOP_ANCHOR - 1)) >= 0:
        period = len(tail) - LOOP_ANCHOR - place
        if period * LOOP_TIMES > len(tail):
            break
        needed = max(LOOP_CHARACTERS, period * LOOP_TIMES)
        if tail[-needed + period :] == tail[-needed:-period]:
            return any(map(str.isalnum, tail[-period:]))
    return False
