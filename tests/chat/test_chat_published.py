"""smollm3_published against renderings written out by hand, with the published faults it keeps and those it refuses."""

import pytest

from smolpost.chat.render import load_template, render, render_spans, template_hash
from smolpost.errors import UserError

DAY = "01 July 2025"
PUBLISHED = load_template("smollm3_published")
USER = {"role": "user", "content": "hi"}
HEADER = (
    "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 01 July 2025\n"
    "Reasoning Mode: {mode}\n\n## Custom Instructions\n\n{instructions}\n\n"
)
PERSONA = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."


def text_of(messages, **kwargs):
    return render(PUBLISHED, messages, today=DAY, **kwargs)


def test_think_mode_leaves_the_system_turn_open_without_tools():
    text = text_of([USER, {"role": "assistant", "content": "\n\n<think>\nhm\n</think>\nyo"}])
    header, rest = text.split("\n\n<|im_start|>user\n")
    assert header.startswith(HEADER.format(mode="/think", instructions=PERSONA).rstrip("\n"))
    assert header.endswith("concise and detail necessary steps needed to reach the conclusion.")
    # sha256 of the persona, as in public copies of the released template
    assert template_hash(header.split("## Custom Instructions\n\n")[1]) == "4e4459579a24d872"
    assert rest == "hi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\nyo<|im_end|>\n"


def test_no_think_mode_puts_an_empty_block_before_each_reply():
    messages = [
        {"role": "system", "content": "Files in /think/tank. /no_think"},
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\nyo"},
    ]
    text, spans = render_spans(PUBLISHED, messages, today=DAY)
    reply = "<think>\nhm\n</think>\nyo<|im_end|>"
    assert text == HEADER.format(mode="/no_think", instructions="Files in /tank.") + (
        f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n{reply}\n"
    )
    assert [text[a:b] for a, b in spans] == [reply]
    prompt = text_of(messages[:2], add_generation_prompt=True)
    assert text == prompt + reply + "\n"
    assert text_of([USER], template_kwargs={"enable_thinking": False}).startswith(
        HEADER.format(mode="/no_think", instructions=PERSONA)
    )


def test_tools_and_results():
    messages = [USER, {"role": "assistant", "content": "<tool_call>{}</tool_call>"}, {"role": "tool", "content": "18C"}]
    kwargs = {
        "xml_tools": [{"name": "f", "n": None}, "g()"],
        "custom_instructions": "x",
        "python_tools": ["def h()"],
    }
    assert text_of(messages, template_kwargs=kwargs) == HEADER.format(mode="/think", instructions="x") + (
        "### Tools\n\nYou may call one or more functions to assist with the user query.\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n\n"
        "<tools>\n{'name': 'f', 'n': None}\ng()\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        "When you send a message containing Python code between '<code>' and '</code>' tags, it will be executed in a "
        "stateful Jupyter notebook environment, and you will then be given the output to continued reasoning in an "
        "agentic loop.\n\nYou can use the following tools in your python code like regular functions:\n"
        "<tools>\ndef h()\n</tools>\n\nThe state persists between code executions: so variables that you define "
        "in one step are still available thereafter.\n\n<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<tool_call>{}</tool_call><|im_end|>\n"
        "<|im_start|>user\n18C<|im_end|>\n"
    )


def test_system_override_closes_its_turn():
    messages = [{"role": "system", "content": "Only this. /system_override"}, USER]
    assert text_of(messages) == "<|im_start|>system\nOnly this.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "kwargs", "complaint"),
    [
        (
            [USER],
            {"tools": [{"name": "f"}]},
            "^tools were given, which the published template ignores",
        ),
        (
            [{"role": "system", "content": "/system_override"}, USER],
            {"template_kwargs": {"xml_tools": ["f"]}},
            "^tools were given beside /system_override",
        ),
        (
            [{"role": "system", "content": "a"}, USER],
            {"template_kwargs": {"custom_instructions": "b"}},
            "^custom_instructions were given beside a system message",
        ),
        (
            [USER, {"role": "system", "content": "a"}],
            {},
            r"^messages\[1\]\.role=system here is dropped",
        ),
        ([{"role": "user", "content": ["a"]}], {}, r"^messages\[0\]\.content is not a string"),
        (
            [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}],
            {},
            r"^messages\[1\] has tool_calls or reasoning apart from its content",
        ),
    ],
)
def test_what_the_published_template_would_drop_is_refused(messages, kwargs, complaint):
    with pytest.raises(UserError, match=complaint):
        text_of(messages, **kwargs)
