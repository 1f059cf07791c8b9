"""Thinking and answer are told apart while a reply comes, as the complete reply is read afterwards."""

import random

import pytest

from smolpost.chat.reasoning import split_reasoning
from smolpost.talk.splitter import ANSWER, THINKING, Splitter


def pieces_of(text, *, opened=False, size=None, draw=None):
    splitter, found, place = Splitter(opened=opened), [], 0
    while place < len(text):
        step = size or draw.randint(1, 5)
        found += splitter.add(text[place : place + step])
        place += step
    return [*found, *splitter.end()]


def joined(pieces, kind):
    return "".join(text for k, text in pieces if k == kind)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "opened", "thinking", "answer"),
    [
        ("4", False, "", "4"),
        ("<think>\na b\n</think>\n\n4 <b>", False, "\na b\n", "4 <b>"),
        ("  <think></think>4", False, "", "4"),
        ("a\n</think>\n4", True, "a\n", "4"),
        ("<think>the tag </think> is\nit\n</think>4", False, "the tag ", " is\nit\n</think>4"),
        ("<think>\nthe tag </think> is it\n</think>4", False, "\nthe tag </think> is it\n", "4"),
        ("<think>\na </thi", False, "\na </thi", ""),
        ("<think>\na", False, "\na", ""),
        ("<thin air>", False, "", "<thin air>"),
        ("<think>\na\n</think>\n<think>\nb\n</think>\n4", False, "\na\n\nb\n", "4"),
    ],
)
def test_pieces_of_any_size(text, opened, thinking, answer, size):
    pieces = pieces_of(text, opened=opened, size=size)
    assert joined(pieces, THINKING) == thinking and joined(pieces, ANSWER) == answer
    assert split_reasoning(text, opened_in_prompt=opened)[1].strip() == answer.strip()


def test_well_formed_replies_of_any_text_are_read_as_the_complete_reply_is():
    draw = random.Random(0)
    bits = ["a", " ", "\n", "\r\n", "<th", "ink>", "</thi", "<", "日本", "<think>"]
    for _ in range(3000):
        inner, rest = ("".join(draw.choices(bits, k=draw.randint(0, 8))) for _ in range(2))
        text = f"<think>\n{inner}\n</think>\n{rest}"
        reasoning, answer = split_reasoning(text)
        pieces = pieces_of(text, draw=draw)
        assert joined(pieces, ANSWER).strip() == answer.strip(), text
        assert "".join(joined(pieces, THINKING).split()) == "".join(reasoning.split()), text
