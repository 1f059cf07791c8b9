import pytest

from smolpost.chat.calls import call_blocks

CALL = '<tool_call>{"a": 1}</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CALL, [CALL]),
        (f"Let me look.\n{CALL}\n{CALL}", [CALL, CALL]),
        (f"  {CALL} and words behind it", [CALL]),
        (f"Let me look. {CALL}", [CALL]),
        (f"Let me look. {CALL} {CALL}\n", [CALL, CALL]),
        (CALL + CALL, [CALL, CALL]),
        (f"Write {CALL} to call it.", []),
        ("<tool_call> opens a call", []),
        ("<code>x</code> is HTML, and <code>y</code>\ntoo", []),
        ("First <code>x</code>, then <code>f()</code>", ["<code>f()</code>"]),
        ("<code>\r\nprint(1)\r\n</code>\r\n", ["<code>\r\nprint(1)\r\n</code>"]),
        ('<tool_call>{"q": "</tool_call>"}</tool_call>', ['<tool_call>{"q": "</tool_call>"}</tool_call>']),
        ('<tool_call>{"q": "<code>x</code>"}</tool_call>', ['<tool_call>{"q": "<code>x</code>"}</tool_call>']),
    ],
)
def test_calls_by_hand(text, expected):
    blocks = call_blocks(text)
    assert [text[block.start : block.end] for block in blocks] == expected
    for block in blocks:
        inner = text[block.inner_start : block.inner_end]
        assert f"<{block.tag}>{inner}</{block.tag}>" == text[block.start : block.end]


def test_only_the_asked_tags_count():
    text = f"<code>f()</code>\n{CALL}"
    assert [block.tag for block in call_blocks(text, ("tool_call",))] == ["tool_call"]
