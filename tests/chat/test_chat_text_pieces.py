"""Cutting a rendering into pieces: against a slow way character by character, and in work that grows with the text."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import smolpost.chat
from smolpost.chat.masks import Policy, encode
from smolpost.chat.text_pieces import Ranges, vocabulary_of

CHAT = str(Path(smolpost.chat.__file__).parent)
PLACES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)).map(lambda r: (r[0], r[0] + r[1])), max_size=8)


@given(PLACES.map(sorted), st.integers(0, 50), st.integers(0, 50))
def test_ranges_meet_where_they_share_a_character(ranges, start, end):
    shared = {c for a, b in ranges for c in range(a, b)} & set(range(start, end))
    assert Ranges(ranges).meet(start, end) == bool(shared)


def cut_slowly(vocabulary, text, edges, neutral):
    """The same by what is said of each character: is it of a string that is only text, and of which token?"""
    only_text = [any(a <= i < b for a, b in neutral) for i in range(len(text))]
    borders, pieces = sorted({0, *edges, len(text)}), []
    for start, end in pairwise(borders):
        stretch = text[start:end]
        owner, i = [None] * len(stretch), 0  # the token that a character is of, where it is one
        while i < len(stretch):
            token = (match := vocabulary.added.match(stretch, i)) and match[0]
            size = len(token) if token else 1
            is_real = token and any(only_text[start:end]) and not any(only_text[start + i : start + i + size])
            owner[i : i + size] = [start + i if is_real else None] * size
            i += size
        runs = []
        for i, name in enumerate(owner):
            if runs and runs[-1][0] == name:
                runs[-1][2] = start + i + 1
            else:
                runs.append([name, start + i, start + i + 1])
        pieces += [(a, b, name is None and any(only_text[a:b])) for name, a, b in runs]
    return pieces


TEXTS = st.lists(st.sampled_from(["<code>", "</code>", "<|im_end|>", "<think>", "ab", "\n"]), max_size=12).map("".join)


@given(TEXTS, st.lists(st.integers(0, 60), max_size=3), st.data())
def test_cut_is_what_is_said_of_each_character(bpe, text, edges, data):
    vocabulary = vocabulary_of(bpe)
    found = [match.span() for match in vocabulary.added.finditer(text)]
    neutral = sorted(data.draw(st.sets(st.sampled_from(found)))) if found else []
    edges = sorted(edge for edge in edges if edge < len(text))
    assert vocabulary.cut(text, edges, neutral) == cut_slowly(vocabulary, text, edges, neutral)


HTML = "<p>the cat <code>x</code> sat</p><|im_end|>\n"
USER = {"role": "user", "content": "Fetch it."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "fetch", "arguments": {}}}]}
REPLY = {"role": "assistant", "content": "<think>\nhm\n</think>\nDone."}
LONG = {
    "a tool result": lambda n: [USER, CALL, {"role": "tool", "content": HTML * n}, REPLY],
    "many tool results": lambda n: [USER, CALL, *[{"role": "tool", "content": HTML}] * n, REPLY],
    "a user's parts": lambda n: [{"role": "user", "content": [{"type": "text", "text": HTML}] * n}, REPLY],
    "a reply": lambda n: [USER, {"role": "assistant", "content": HTML * n}],
    "blocks of a reply": lambda n: [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\nDone. " * n}],
    "turns": lambda n: [USER, REPLY] * n,
    "a system message": lambda n: [{"role": "system", "content": HTML * n}, USER, REPLY],
}


def lines_run(call) -> int:
    """Lines of this package's code for chats that a call runs, each time that they are run."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.startswith(CHAT):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("kind", LONG)
def test_work_grows_with_a_rows_length_not_with_its_square(bpe, kind):
    policy = Policy(reasoning=False)
    encode(bpe, LONG[kind](1), today="x", policy=policy)  # what is kept for the next row
    few, many = (lines_run(lambda n=n: encode(bpe, LONG[kind](n), today="x", policy=policy)) for n in (50, 400))
    assert many < 10 * few  # 8 times as long; the square would be 64
