import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode
from smolpost.chat.reasoning import split_reasoning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", (None, "plain")),
        ("", (None, "")),
        ("<think>\na\nb\n</think>\nyes", ("a\nb", "yes")),
        ("<think>\n\n</think>\nyes", ("", "yes")),
        ("<think></think>yes", ("", "yes")),
        ("\n <think>a</think>\n\n  indented", ("a", "  indented")),
        ("<think>\ncut by len", ("cut by len", "")),
        ("<think>", ("", "")),
        ("a\n</think>\nyes", ("a", "yes")),
        ("</think>\nyes", ("", "yes")),
        ("<think>a</think>\n<think>b</think>yes", ("a\nb", "yes")),
        ("<think>\r\na\r\n</think>\r\n\r\nyes\r\n", ("a", "yes\r\n")),
        ("<think>\nI write `</think>` to close it.\n</think>\nyes", ("I write `</think>` to close it.", "yes")),
        ("<think>\na</think> yes", ("a", " yes")),
        # Words about the tags.
        ("Well. <think>a</think>yes<think>b</think>", (None, "Well. <think>a</think>yes<think>b</think>")),
        (
            "Open it with `<think>`, then\n</think>\ncloses it.",
            (None, "Open it with `<think>`, then\n</think>\ncloses it."),
        ),
        ("Close it with </think>.", (None, "Close it with </think>.")),
        ("<think>a</think>yes <think> is a tag", ("a", "yes <think> is a tag")),
    ],
)
def test_split_by_hand(text, expected):
    assert split_reasoning(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("cut", ("cut", "")), ("a</think>\nb", ("a", "b")), ("<think>a</think>b", ("a", "b")), ("", ("", ""))],
)
def test_split_where_the_prompt_opened_the_block(text, expected):
    assert split_reasoning(text, opened_in_prompt=True) == expected


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(["a", " ", "\n", "\r\n", "<think>", "</think>", "é"]), max_size=10).map("".join))
def test_answer_is_what_the_template_renders_in_no_think_mode(bpe, text):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    ids, fates, *_ = encode(bpe, messages, template_kwargs={"enable_thinking": False}, today="d")
    reply = bpe.decode([token for token, fate in zip(ids, fates, strict=True) if fate == Fate.TRAINED])
    assert reply == split_reasoning(text)[1] + "<|im_end|>"
