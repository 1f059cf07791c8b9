"""Replies of all servers in one form: tables by hand, and canonical text that reads back as it was."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from smolpost.chat.reasoning import split_reasoning
from smolpost.synthesis.filters.form import think_format
from smolpost.synthesis.records import Reply
from smolpost.synthesis.replies import canonical, reply_of

BLOCK = "<think>\nTwo and two.\n</think>\n\n"
PART = {"type": "text", "text": "Four."}
THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "Two and two."}]}
CALL = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]


def reply(message: dict, asked: bool | None = True, finish: str = "stop") -> Reply:
    return reply_of({"message": message, "finish_reason": finish}, asked_to_think=asked)


def parts(message: dict, asked: bool | None = True, finish: str = "stop") -> tuple:
    found = reply(message, asked, finish)
    return found.reasoning, found.content, found.closed


WHOLE = ("Two and two.", "Four.", True)


@pytest.mark.parametrize(
    "message",
    [
        {"content": "\n\nFour.", "reasoning": "\nTwo and two.\n"},  # vLLM
        {"content": "Four.", "reasoning": "Two and two.", "reasoning_content": "Two and two."},  # vLLM in between
        {"content": "Four.", "reasoning_content": "Two and two."},  # SGLang, llama.cpp, transformers, DeepSeek
        {"content": "Four.", "reasoning": None, "reasoning_content": "Two and two."},
        {"content": "Four.", "reasoning_content": [{"type": "text", "text": "Two and two."}]},
        {"content": "Four.", "reasoning": {"summary": [{"type": "summary_text", "text": "Two and two."}]}},
        {"content": BLOCK + "Four."},  # no parser
        {"content": "<think>Two and two.</think>Four."},
        {"content": "Two and two.\n</think>\n\nFour."},  # the template opened the block
        {"content": "Two and two.</think>\n\nFour."},
        {"content": [THINKING, PART]},  # Mistral
        {"content": [{"type": "text", "text": BLOCK}, PART]},
        {"content": BLOCK + "Four.", "reasoning_content": "Two and two."},  # a gateway that gives both
        {"content": "<think>\n\n</think>\n\nFour.", "reasoning_content": "Two and two."},
    ],
)
def test_a_reply_that_thought(message):
    assert parts(message) == WHOLE
    assert canonical(reply(message)) == BLOCK + "Four."


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "Four."}, (None, "Four.", True)),
        ({"content": "Four.", "reasoning": None}, (None, "Four.", True)),
        ({"content": "Four.", "reasoning_content": ""}, (None, "Four.", True)),
        ({"content": "<think>\n\n</think>\n\nFour."}, ("", "Four.", True)),  # Qwen3 after /no_think
        ({"content": "<think></think>Four."}, ("", "Four.", True)),
        ({"content": "Write </think> to end it."}, (None, "Write </think> to end it.", True)),
        ({"content": "The tag <think> opens a block."}, (None, "The tag <think> opens a block.", True)),
        ({"content": None}, (None, "", True)),
        ({}, (None, "", True)),
    ],
)
@pytest.mark.parametrize("asked", [False, None])
def test_a_reply_that_did_not_think(message, expected, asked):
    assert parts(message, asked) == expected
    assert canonical(reply(message, asked)) == expected[1]  # SmolTalk2's no-think rows have no block


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None, "reasoning": "Two and"}, ("Two and", "", False)),  # vLLM
        ({"content": "", "reasoning_content": "Two and"}, ("Two and", "", False)),
        ({"content": "<think>\nTwo and"}, ("Two and", "", False)),
        ({"content": "Two and"}, ("Two and", "", False)),  # opened in the prompt
        ({"content": "Fo", "reasoning": "Two and two."}, ("Two and two.", "Fo", True)),
        ({"content": BLOCK + "Fo"}, ("Two and two.", "Fo", True)),
    ],
)
def test_a_reply_that_was_cut(message, expected):
    assert parts(message, finish="length") == expected
    text = canonical(reply(message, finish="length"))
    assert text == ("<think>\nTwo and" if not expected[2] else BLOCK + "Fo")
    assert split_reasoning(text) == expected[:2]


def test_a_reply_that_was_cut_without_being_asked_to_think_is_an_answer():
    assert parts({"content": "Two and"}, asked=False, finish="length") == (None, "Two and", True)


def test_a_reply_that_did_not_think_though_it_was_asked_to():
    assert parts({"content": "Four."}) == (None, "Four.", True)


def test_tags_inside_an_answer_are_text():
    message = {"content": "Close it with </think>\nand go on.", "reasoning": "Which tag?"}
    assert parts(message) == ("Which tag?", "Close it with </think>\nand go on.", True)
    other = {"content": "<think>\nSomething else.\n</think>\n\nFour.", "reasoning": "Two and two."}
    assert parts(other)[1] == other["content"]
    assert think_format(reply(other), True).reason == "think_tags"  # training would read another border


def test_calls_usage_and_what_the_server_said():
    message = {"role": "assistant", "content": None, "reasoning": "I add.", "tool_calls": CALL}
    choice = {"message": message, "finish_reason": "function_call"}
    usage = {"prompt_tokens": 3, "completion_tokens": 9}
    found = reply_of(choice, asked_to_think=True, usage=usage, attempts=2, seconds=1.5)
    assert found == Reply("", "I add.", "tool_calls", True, CALL, 3, 9, 2, 1.5, message)
    assert reply({"content": "Four.", "tool_calls": []}).tool_calls is None
    cut = reply({"content": None, "reasoning": "I add.", "tool_calls": CALL}, finish="length")
    assert cut.closed  # a call comes after the block


texts = st.text(st.sampled_from("ab \n<>/") | st.characters(codec="utf-8"), max_size=30)
tagged = st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n", "\r\n"]), max_size=8).map("".join)


@given(reasoning=texts | tagged, content=texts | tagged, field=st.sampled_from(["reasoning", "reasoning_content"]))
def test_canonical_text_reads_back_as_the_reply(reasoning, content, field):
    found = reply({"content": content, field: reasoning}, asked=bool(reasoning.strip()))
    assume(think_format(found, None).passed)
    reasoning = found.reasoning if (found.reasoning or "").strip() else None
    assert split_reasoning(canonical(found)) == (reasoning, found.content.lstrip("\r\n"))


@given(reasoning=texts, content=texts)
def test_inline_and_in_a_field_are_the_same(reasoning, content):
    assume(reasoning.strip() and "<" not in reasoning + content)
    inline = reply({"content": f"<think>\n{reasoning}\n</think>\n\n{content}"})
    assert parts({"content": content, "reasoning": reasoning}) == (inline.reasoning, inline.content, inline.closed)
