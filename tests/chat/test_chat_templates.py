"""Hand-written renderings of both templates, every mode, and the six faults of the published template."""

from datetime import datetime

import pytest

from smolpost.chat.masks import encode
from smolpost.chat.render import load_template, render, render_spans
from smolpost.errors import UserError

DAY = "01 July 2025"
USER = {"role": "user", "content": "hi"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
WEATHER_JSON = (
    '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}'
)
HEADER = """<|im_start|>system
## Metadata

Knowledge Cutoff Date: June 2025
Today Date: 01 July 2025
Reasoning Mode: {mode}

## Custom Instructions

{instructions}<|im_end|>
"""
ASK_TOOL = [USER, {"role": "assistant", "content": "<tool_call>{}</tool_call>"}]
DEFAULT = {
    "/think": "You are SmolLM, a helpful assistant. Think the request through first, then answer.",
    "/no_think": "You are SmolLM, a helpful assistant. Answer directly.",
}


def text_of(tokenizer, messages, **kwargs):
    return render(tokenizer, messages, today=DAY, **kwargs)


def replies(tokenizer, messages, **kwargs):
    text, spans = render_spans(tokenizer, messages, today=DAY, **kwargs)
    return [text[start:end] for start, end in spans]


def after_header(text):
    return text.split("<|im_end|>\n", 1)[1]


def call(name="weather", arguments='{"city": "Paris"}', **more):
    return {"function": {"name": name, "arguments": arguments}, **more}


# ───── modes and the system turn ─────


def test_think_mode_is_the_default(bpe):
    messages = [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\nyo"}]
    assert text_of(bpe, messages) == HEADER.format(mode="/think", instructions=DEFAULT["/think"]) + (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\nyo<|im_end|>\n"
    )
    assert replies(bpe, messages) == ["<think>\nhm\n</think>\nyo<|im_end|>"]


def test_no_think_mode_prefills_every_reply(bpe):
    messages = [USER, {"role": "assistant", "content": "yo"}, USER, {"role": "assistant", "content": "again"}]
    kwargs = {"template_kwargs": {"enable_thinking": False}}
    assert text_of(bpe, messages, **kwargs) == HEADER.format(mode="/no_think", instructions=DEFAULT["/no_think"]) + (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\nyo<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\nagain<|im_end|>\n"
    )
    assert replies(bpe, messages, **kwargs) == ["yo<|im_end|>", "again<|im_end|>"]


@pytest.mark.parametrize(
    ("thinking", "prompt"),
    [(True, "<|im_start|>assistant\n"), (False, "<|im_start|>assistant\n<think>\n\n</think>\n")],
)
def test_generation_prompt(bpe, thinking, prompt):
    kwargs = {"template_kwargs": {"enable_thinking": thinking}}
    assert text_of(bpe, [USER], add_generation_prompt=True, **kwargs) == text_of(bpe, [USER], **kwargs) + prompt


@pytest.mark.parametrize(
    ("content", "kwarg", "mode", "instructions"),
    [
        ("Be brief. /no_think", True, "/no_think", "Be brief."),
        ("Be brief. /think", False, "/think", "Be brief."),
        ("/no_think\nBe  brief.\n\n- twice", None, "/no_think", "Be  brief.\n\n- twice"),
        ("/no_think\r\nBe brief.", None, "/no_think", "Be brief."),
        ("/think", False, "/think", DEFAULT["/think"]),
        ("/no_think /think", True, "/no_think", DEFAULT["/no_think"]),
        ("Files lie in /think/tank.", False, "/no_think", "Files lie in /think/tank."),
        ("", None, "/think", DEFAULT["/think"]),
    ],
)
def test_system_flags_override_the_keyword_and_are_stripped(bpe, content, kwarg, mode, instructions):
    messages = [{"role": "system", "content": content}, USER]
    text = text_of(bpe, messages, template_kwargs={"enable_thinking": kwarg})
    assert text == HEADER.format(mode=mode, instructions=instructions) + "<|im_start|>user\nhi<|im_end|>\n"


def test_none_and_empty_kwargs_are_no_kwargs(bpe):
    nothing = {"custom_instructions": None, "enable_thinking": None, "python_tools": None, "xml_tools": None}
    empty = {"custom_instructions": "", "python_tools": [], "xml_tools": []}
    assert text_of(bpe, [USER], template_kwargs=nothing) == text_of(bpe, [USER])
    assert text_of(bpe, [USER], template_kwargs=empty, tools=[]) == text_of(bpe, [USER])
    # The stock call passes None on to the template.
    stock = bpe.apply_chat_template([USER], tokenize=False, today=DAY, **nothing)
    assert stock == text_of(bpe, [USER])


def test_custom_instructions_from_kwarg_and_system_message(bpe):
    system = {"role": "system", "content": "From the message."}
    kwargs = {"template_kwargs": {"custom_instructions": "From the row."}}
    assert "Instructions\n\nFrom the row.<|im_end|>" in text_of(bpe, [USER], **kwargs)
    assert "Instructions\n\nFrom the message.\n\nFrom the row.<|im_end|>" in text_of(bpe, [system, USER], **kwargs)
    twice = {"template_kwargs": {"custom_instructions": "From the message."}}
    assert text_of(bpe, [system, USER], **twice) == text_of(bpe, [system, USER])


def test_system_override_keeps_only_the_custom_text(bpe):
    messages = [{"role": "system", "content": "Only this. /system_override /no_think"}, USER]
    assert text_of(bpe, messages, add_generation_prompt=True) == (
        "<|im_start|>system\nOnly this.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n"
    )


def test_system_override_without_text_leaves_no_system_turn(bpe):
    messages = [{"role": "system", "content": "/system_override"}, USER]
    assert text_of(bpe, messages) == "<|im_start|>user\nhi<|im_end|>\n"
    with_tool = text_of(bpe, messages, template_kwargs={"xml_tools": ["f()"]})
    assert with_tool.startswith("<|im_start|>system\n## Tools\n\n### XML Tools\n\n")
    kept = text_of(bpe, messages, template_kwargs={"custom_instructions": "Row."})
    assert kept == "<|im_start|>system\nRow.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"


def test_chatml_has_no_header_to_override():
    messages = [{"role": "system", "content": "/system_override"}, USER]
    chatml = load_template("chatml")
    assert render(chatml, messages, today=DAY) == render(chatml, [USER], today=DAY)


def test_later_system_message_is_a_turn_of_its_own(bpe):
    text = text_of(bpe, [USER, {"role": "system", "content": "New rule. /no_think"}], add_generation_prompt=True)
    assert after_header(text) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>system\nNew rule. /no_think<|im_end|>\n<|im_start|>assistant\n"
    )


# ───── tools ─────


def test_xml_tools_by_hand(bpe):
    text = text_of(bpe, [USER], template_kwargs={"xml_tools": ['{"name": "a"}', WEATHER], "custom_instructions": "x"})
    assert text.split("## Custom Instructions\n\n")[1] == (
        "x\n\n## Tools\n\n### XML Tools\n\nThese functions are available; each line is one signature.\n\n"
        '<tools>\n{"name": "a"}\n' + WEATHER_JSON + "\n</tools>\n\n"
        'Write each call as <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\n'
        "<|im_start|>user\nhi<|im_end|>\n"
    )


def test_python_tools_by_hand(bpe):
    text = text_of(bpe, [USER], template_kwargs={"python_tools": ["def f(x): ..."], "custom_instructions": "x"})
    assert text.split("## Custom Instructions\n\n")[1] == (
        "x\n\n## Tools\n\n### Python Tools\n\nThese Python functions are available.\n\n"
        "<tools>\ndef f(x): ...\n</tools>\n\n"
        "Write each call as <code>name(arg=value)</code>.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


def test_both_kinds_of_tools_follow_each_other(bpe):
    text = text_of(bpe, [USER], template_kwargs={"python_tools": [{"name": "f"}], "xml_tools": "one string"})
    assert text.index("## Tools") < text.index("### XML Tools") < text.index("one string") < text.index("### Python")
    assert '<tools>\n{"name": "f"}\n</tools>' in text
    assert text.count("## Tools\n") == 1


def test_tools_argument_equals_xml_tools(bpe):
    expected = text_of(bpe, [USER], template_kwargs={"xml_tools": [WEATHER]})
    assert text_of(bpe, [USER], tools=[WEATHER]) == expected
    assert text_of(bpe, [USER], tools=[WEATHER], template_kwargs={"xml_tools": [WEATHER]}) == expected
    assert bpe.apply_chat_template([USER], tools=[WEATHER], tokenize=False, today=DAY) == expected


def test_no_tools_section_without_tools(bpe):
    assert "Tools" not in text_of(bpe, [USER])


@pytest.mark.parametrize("arguments", ['{"city":"Zürich","n":2}', {"city": "Zürich", "n": 2}])
@pytest.mark.parametrize("content", [None, "", "Looking."])
def test_structured_calls_follow_the_content(bpe, arguments, content):
    bare = {"name": "weather", "arguments": arguments}
    for calls in ([call(arguments=arguments)], [call(arguments=arguments, type="function", id="c1")], [bare]):
        messages = [USER, {"role": "assistant", "content": content, "tool_calls": calls}]
        assert replies(bpe, messages) == [
            ("Looking.\n" if content else "")
            + '<tool_call>{"name": "weather", "arguments": {"city": "Zürich", "n": 2}}</tool_call><|im_end|>'
        ]


def test_parallel_calls_and_odd_arguments(bpe):
    calls = [call("a", "{}"), call("b", None), call("c", ""), call("d", "not json")]
    assert replies(bpe, [USER, {"role": "assistant", "tool_calls": calls}]) == [
        '<tool_call>{"name": "a", "arguments": {}}</tool_call>\n<tool_call>{"name": "b", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "c", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "d", "arguments": not json}</tool_call><|im_end|>'
    ]


def test_calls_are_code_where_only_python_tools_are_given(bpe):
    arguments = '{"city": "Paris", "days": 3, "units": null, "fast": true, "at": ["a", 1.5]}'
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call(arguments=arguments), call("g", "{}")]},
    ]
    kwargs = {"python_tools": ["def weather(**k): ..."]}
    assert replies(bpe, messages, template_kwargs=kwargs) == [
        "<code>weather(city='Paris', days=3, units=None, fast=True, at=['a', 1.5])</code>\n<code>g()</code><|im_end|>"
    ]
    (both,) = replies(bpe, messages, template_kwargs={**kwargs, "xml_tools": ["x"]})
    assert both.startswith("<tool_call>")


def test_legacy_function_call(bpe):
    messages = [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
    ]
    assert after_header(text_of(bpe, messages)).endswith(
        '<|im_start|>assistant\n<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>1</tool_response><|im_end|>\n"
    )


def test_tool_result_that_brings_its_tags_gets_no_second_pair(bpe):
    text = text_of(bpe, [*ASK_TOOL, {"role": "tool", "content": "<tool_response>\n1\n</tool_response>"}])
    assert text.endswith("<|im_start|>tool\n<tool_response>\n1\n</tool_response><|im_end|>\n")


# ───── contents and reasoning ─────


def test_list_content_is_the_concatenated_text(bpe):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}]
    for role in ("system", "user", "assistant", "tool"):
        listed = [*ASK_TOOL, {"role": role, "content": parts}]
        assert text_of(bpe, listed) == text_of(bpe, [*ASK_TOOL, {"role": role, "content": "ab\n"}])
        if role != "tool":
            assert text_of(bpe, listed[2:]) == text_of(bpe, [{"role": role, "content": "ab\n"}])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_separate_reasoning_becomes_the_think_block(bpe, key):
    messages = [USER, {"role": "assistant", "content": "yo", key: "\nhm\n"}]
    assert replies(bpe, messages) == ["<think>\nhm\n</think>\nyo<|im_end|>"]
    assert replies(bpe, messages, template_kwargs={"enable_thinking": False}) == ["yo<|im_end|>"]
    own = [USER, {"role": "assistant", "content": "<think>\nmine\n</think>\nyo", key: "hm"}]
    assert replies(bpe, own) == ["<think>\nmine\n</think>\nyo<|im_end|>"]
    about = "Close it with `</think>`: re.sub('<think>.*?</think>', '', text)."
    messages = [USER, {"role": "assistant", "content": about, key: "hm"}]
    assert replies(bpe, messages) == [f"<think>\nhm\n</think>\n{about}<|im_end|>"]
    assert replies(bpe, messages, template_kwargs={"enable_thinking": False}) == [about + "<|im_end|>"]


def test_reasoning_before_a_call_without_content(bpe):
    messages = [USER, {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call("f", "{}")]}]
    body = '<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>'
    assert replies(bpe, messages) == ["<think>\nhm\n</think>\n" + body]
    assert replies(bpe, messages, template_kwargs={"enable_thinking": False}) == [body]


@pytest.mark.parametrize("key", ["train", "training"])
def test_untrained_turn_has_no_span_and_the_same_text(bpe, chatml, key):
    messages = [USER, {"role": "assistant", "content": "a"}, USER, {"role": "assistant", "content": "b"}]
    marked = [USER, {**messages[1], key: False}, USER, {**messages[3], key: True}]
    for tokenizer in (bpe, chatml):
        assert text_of(tokenizer, marked) == text_of(tokenizer, messages)
        assert replies(tokenizer, marked) == ["b<|im_end|>"]


# ───── the six faults of the published template ─────


def test_fault_1_calls_and_tools_argument_are_not_dropped(bpe):
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call()]},
        {"role": "tool", "content": "18C"},
    ]
    text = text_of(bpe, messages, tools=[WEATHER])
    assert WEATHER_JSON in text
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>' in text


def test_fault_2_tool_results_are_not_user_turns(bpe):
    as_tool = text_of(bpe, [*ASK_TOOL, {"role": "tool", "content": "18C"}])
    assert after_header(as_tool).endswith(
        "<|im_end|>\n<|im_start|>tool\n<tool_response>18C</tool_response><|im_end|>\n"
    )
    assert as_tool != text_of(bpe, [*ASK_TOOL, {"role": "user", "content": "18C"}])
    assert text_of(bpe, [*ASK_TOOL, {"role": "function", "content": "18C"}]) == as_tool
    with pytest.raises(UserError, match=r"^messages\[1\]\.role=tool is a tool result without a call before it; add"):
        text_of(bpe, [USER, {"role": "tool", "content": "18C"}])


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("<think>\nhm\n</think>\nyo", "yo"),
        ("<think>\n\n</think>\nyo", "yo"),
        ("\n<think>hm</think>yo", "yo"),
        ("hm\n</think>\n\nyo", "yo"),
        ("<think>a</think>\n<think>\nb\n</think>\nyo", "yo"),
        ("<think>\r\nhm\r\n</think>\r\n\r\nyo", "yo"),
        ("Well. <think>hm</think>yo <think>x</think>", "Well. <think>hm</think>yo <think>x</think>"),
        ("<think>\ncut by leng", ""),
        ("write <think> to open a block", "write <think> to open a block"),
    ],
)
def test_fault_3_no_think_reply_has_exactly_one_empty_block(bpe, content, answer):
    kwargs = {"template_kwargs": {"enable_thinking": False}}
    messages = [USER, {"role": "assistant", "content": content}]
    expected = f"<|im_start|>assistant\n<think>\n\n</think>\n{answer}<|im_end|>\n"
    assert text_of(bpe, messages, **kwargs).endswith(expected)
    assert replies(bpe, messages, **kwargs) == [answer + "<|im_end|>"]


@pytest.mark.parametrize("system", [None, "text", "/no_think", "/system_override", "text /system_override"])
@pytest.mark.parametrize("tools", [{}, {"xml_tools": ["x"]}, {"python_tools": ["p"]}])
def test_fault_4_every_turn_is_closed(bpe, system, tools):
    messages = [USER] if system is None else [{"role": "system", "content": system}, USER]
    text = text_of(bpe, [*messages, {"role": "assistant", "content": "a"}], template_kwargs=tools)
    assert text.count("<|im_start|>") == text.count("<|im_end|>\n") == len(text.split("<|im_end|>\n")) - 1
    assert all(turn.startswith("<|im_start|>") for turn in text.split("<|im_end|>\n")[:-1])


def test_fault_5_the_date_is_frozen_where_given_and_the_clock_elsewhere(bpe):
    assert "Today Date: 01 July 2025\n" in text_of(bpe, [USER])
    before = datetime.now()
    stock = bpe.apply_chat_template([USER], tokenize=False)
    possible = [f"Today Date: {moment:%d %B %Y}\n" for moment in (before, datetime.now())]
    assert any(date in stock for date in possible)


@pytest.mark.parametrize("thinking", [True, False])
def test_fault_6_spans_hold_neither_header_nor_prefilled_block(bpe, thinking):
    kwargs = {"template_kwargs": {"enable_thinking": thinking}}
    text, spans = render_spans(bpe, [USER, {"role": "assistant", "content": "yo"}], today=DAY, **kwargs)
    ((start, end),) = spans
    assert text[start:end] == "yo<|im_end|>"
    assert text[:start] == text_of(bpe, [USER], add_generation_prompt=True, **kwargs)
    assert text[end:] == "\n"


# ───── chatml ─────


def test_chatml_renders_turns_as_they_are(chatml):
    messages = [
        {"role": "system", "content": "Keep /think here."},
        USER,
        {"role": "assistant", "content": "\n<think>\nhm\n</think>\nyo", "tool_calls": [call("f", "{}")]},
        {"role": "tool", "content": [{"type": "text", "text": "18C"}]},
    ]
    reply = '\n<think>\nhm\n</think>\nyo\n<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>'
    expected = (
        "<|im_start|>system\nKeep /think here.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        f"<|im_start|>assistant\n{reply}\n<|im_start|>tool\n18C<|im_end|>\n"
    )
    for thinking in (True, False):
        kwargs = {"template_kwargs": {"enable_thinking": thinking}}
        assert text_of(chatml, messages, **kwargs) == expected
        assert replies(chatml, messages, **kwargs) == [reply]
        assert text_of(chatml, messages, add_generation_prompt=True, **kwargs) == expected + "<|im_start|>assistant\n"


def test_chatml_renders_separate_reasoning(chatml):
    messages = [USER, {"role": "assistant", "content": "yo", "reasoning_content": "hm"}]
    assert replies(chatml, messages) == ["<think>\nhm\n</think>\nyo<|im_end|>"]


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"tools": [WEATHER]}, "tools were given, but the chatml template lists none; use the smollm3 template"),
        ({"template_kwargs": {"python_tools": ["f"]}}, "tools were given"),
        ({"template_kwargs": {"custom_instructions": "x"}}, "custom_instructions were given, but the chatml template"),
    ],
)
def test_chatml_refuses_what_it_cannot_show(chatml, kwargs, complaint):
    with pytest.raises(UserError, match=complaint):
        text_of(chatml, [USER], **kwargs)


# ───── refused messages ─────


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([USER, {"role": "bot", "content": "x"}], r"^messages\[1\]\.role=bot is unknown; use system, user, assistant"),
        ([USER, {"from": "human", "value": "x"}], r"^messages\[1\]\.role= is unknown"),
        ([{"role": "system", "content": "s"}, {"role": "user"}], r"^messages\[1\]\.content is missing; give a string"),
        ([{"role": "system"}], r"^messages\[0\]\.content is missing"),
        ([{"role": "user", "content": {"text": "x"}}], r"^messages\[0\]\.content is neither a string nor a list"),
        ([{"role": "user", "content": 3}], r"^messages\[0\]\.content is neither"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "url": "u"}]}],
            r"^messages\[0\]\.content\[1\] is not a text part",
        ),
        ([USER, {"role": "assistant", "content": None}], r"^messages\[1\] is an assistant message without content"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"type": "function"}]}],
            r"^messages\[1\]\.tool_calls\[0\] has no function name",
        ),
        ([USER, "hello"], r"^messages\[1\]='hello' is not a message; expected an object with role and content"),
    ],
)
def test_refused_messages_name_the_place(bpe, chatml, messages, complaint):
    for tokenizer in (bpe, chatml):
        with pytest.raises(UserError, match=complaint) as error:
            encode(tokenizer, messages, today=DAY)
        assert "\n" not in str(error.value)
