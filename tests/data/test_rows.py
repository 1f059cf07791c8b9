import json
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolpost.chat.render import load_template, render
from smolpost.data.columns import as_row
from smolpost.data.rows import Row, parse_row, without_nulls
from smolpost.data.sources import read_rows
from smolpost.data.tools import json_schema_tool
from smolpost.data.validate import validate_row
from smolpost.errors import UserError
from smolpost.schema import Source

USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
OTHER, SYSTEM = {**REPLY, "content": "5"}, {"role": "system", "content": "Count."}
CHAT = {"messages": [USER, REPLY]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
RESULT = {"role": "tool", "content": "1"}


def called(**function):
    return {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": function}]}]}


def mapped(row, columns="smoltalk2", rename=None):
    """The row in our columns; what it was is unchanged, and it knows its place."""
    before = json.dumps(row)
    found = as_row(without_nulls(Row(row, "f", 1)), Source(path="f", columns=columns, rename=rename or {}))
    assert json.dumps(row) == before
    assert found.where == "f:1"
    return found


def test_rows_are_pickled_with_their_place():
    row = pickle.loads(pickle.dumps(Row(CHAT, "f", 3)))
    assert row == CHAT and row.where == "f:3"


# ---------------------------------------------------------------- JSON

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON_VALUES), st.booleans())
def test_what_json_writes_is_read_back(row, ascii_only):
    assert parse_row(json.dumps(row, ensure_ascii=ascii_only).encode(), "f:1") == row


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"a" 1}', r"f:1: is not JSON \(Expecting ':' delimiter at column 6\); expected one JSON object per line"),
        (b'{"a": 1} {"a": 2}', r"f:1: is not JSON \(Extra data at column 10\); expected one JSON object per line"),
        (
            b"[1]",
            r"f:1: is a JSON list; expected one JSON object per line, or a list of objects as the whole file$",
        ),
        (b"[\n", r"f:1: is not JSON .*; expected one JSON object per line, or a list of objects"),
        (b"null", "f:1: is a JSON null; expected one JSON object per line"),
        (b'{"a": "\xe9"}', r"f:1: is not UTF-8 \(byte 0xe9 at column 8: Latin-1 .*; save it as UTF-8, .* `iconv -f"),
        ('\ufeff{"a": 1}'.encode(), "f:1: has a byte order mark in the middle of the file; remove it"),
        (b'{"a": 1, "b": {"k": 1, "k": 1}}', "f:1: holds the key 'k' twice in one object; keep one of them"),
        (b'{"a": NaN}', "f:1: holds NaN, which is not JSON; write null, a number or a string"),
        (b'{"a": -Infinity}', "f:1: holds -Infinity, which is not JSON"),
        (b'{"a": 1e999}', "f:1: holds the number 1e999, which is too large for a float; write it as a string"),
        (b'{"a": ' + b"9" * 5000 + b"}", "f:1: holds an integer of more than 4300 digits; write it as a string"),
        (b'{"a": ' + b"[" * 9999 + b"]" * 9999 + b"}", "f:1: is nested more than 100 levels deep; flatten it"),
        (
            b'{"a": [{"b": "x\\ud800y"}]}',
            r"f:1: holds \\ud800, half of a surrogate pair, which is not a character; remove it",
        ),
        (b'{"\\uDC00": 1}', r"f:1: holds \\udc00, half of a surrogate pair"),
    ],
)
def test_broken_json_is_refused(line, message):
    with pytest.raises(UserError, match=message) as error:
        parse_row(line, "f:1")
    assert "\n" not in str(error.value)


def test_whole_surrogate_pairs_and_large_integers_are_read():
    assert parse_row(b'{"a": "\\ud83d\\ude00", "b": 123456789012345678901234567890}', "f:1") == {
        "a": "\U0001f600",
        "b": 123456789012345678901234567890,
    }


# ---------------------------------------------------------------- columns


def test_smoltalk2_rows_stay_as_they_are():
    full = {"prompt": "2+2?", "chosen": [USER, REPLY], "rejected": [USER, OTHER], "source": "s"}
    for row in (CHAT, {"text": "words"}, full, {**full, "prompt": [USER]}, {"a": 1}):
        assert mapped(row) == row


def test_rename_comes_first():
    assert mapped({"dialogue": [USER, REPLY], "id": 1}, rename={"dialogue": "messages"}) == {**CHAT, "id": 1}
    row = mapped({"q": "2+2?", "a": "4"}, "alpaca", {"q": "instruction", "a": "output", "absent": "input"})
    assert row == CHAT
    assert mapped({"text": "a", "words": "b"}, rename={"text": "words", "words": "text"}) == {"text": "b", "words": "a"}
    with pytest.raises(UserError, match="f:1: rename gives two columns the name 'text'; rename the row's own 'text'"):
        mapped({"text": "a", "words": "b"}, rename={"words": "text"})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": [REPLY], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": [USER, REPLY], "rejected": [OTHER]},
    ],
)
def test_bare_replies_get_their_prompt(row):
    whole = {"prompt": row["prompt"], "chosen": [USER, REPLY], "rejected": [USER, OTHER]}
    assert mapped({**row, "source": "s"}) == {**whole, "source": "s"}
    assert validate_row(mapped(row), "f:1") == "preference"
    with_system = mapped({**row, "chosen": "4", "rejected": [OTHER], "system": "Count."})
    assert with_system["chosen"] == [SYSTEM, USER, REPLY] and with_system["rejected"] == [SYSTEM, USER, OTHER]


def test_a_prompt_that_the_assistant_opens_is_found_in_both_sides():
    prompt = [REPLY, USER]
    full = {"prompt": prompt, "chosen": [*prompt, REPLY], "rejected": [*prompt, OTHER]}
    assert mapped(full) == full


def test_texts_without_a_prompt_are_refused():
    with pytest.raises(UserError, match="f:1: chosen and rejected are texts and there is no prompt; expected a prompt"):
        mapped({"chosen": "4", "rejected": "5"})


def said(speaker, value):
    return {"from": speaker, "value": value}


def test_sharegpt_conversation():
    call = {"name": "f", "arguments": {"x": 1}}
    row = {
        "conversations": [
            said("human", "2+2?"),
            said("function_call", json.dumps(call)),
            said("observation", "1"),
            {**said("gpt", "4"), "train": False},
        ],
        "system": "Count.",
        "tools": '[{"name": "f", "parameters": {"type": "object"}}]',
        "id": "x",
    }
    found = mapped(row, "sharegpt")
    assert found == {
        "messages": [
            SYSTEM,
            USER,
            {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
            RESULT,
            {**REPLY, "train": False},
        ],
        "tools": [{"name": "f", "parameters": {"type": "object"}}],
        "id": "x",
    }
    assert validate_row(found, found.where) == "messages"


@pytest.mark.parametrize("speaker", ["tool", "function", "observation"])
def test_sharegpt_results_are_tool_turns(speaker):
    assert mapped({"messages": [said(speaker, "1")]}, "sharegpt")["messages"] == [RESULT]


def test_sharegpt_preference():
    row = {"conversations": [said("human", "2+2?")], "chosen": said("gpt", "4"), "rejected": said("gpt", "5")}
    whole = {"chosen": [SYSTEM, USER, REPLY], "rejected": [SYSTEM, USER, OTHER]}
    assert mapped({**row, "system": "Count."}, "sharegpt") == whole
    lists = {"chosen": [said("human", "2+2?"), said("gpt", "4")], "rejected": [said("human", "2+2?"), said("gpt", "5")]}
    assert mapped({**lists, "system": "Count."}, "sharegpt") == whole


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "x"}, "f:1: has the columns text; columns=sharegpt expects conversations, a list of {from, value}"),
        (
            {"conversations": [said("bot", "x")]},
            r"f:1: conversations\[0\].from is 'bot'; expected one of system, user, .*, as roles: {bot: assistant}",
        ),
        ({"conversations": [said("gpt", None)]}, r"conversations\[0\] has the keys from; columns=sharegpt expects"),
        ({"conversations": [said("gpt", 4)]}, r"conversations\[0\].value is an int; expected a string"),
        (
            {"conversations": ["x"]},
            r"f:1: conversations\[0\] is a str; columns=sharegpt expects from and value; rename",
        ),
        ({"conversations": "x"}, r"f:1: conversations is a str; columns=sharegpt expects a list of {from, value}"),
        ({"conversations": [said("function_call", "f(x)")]}, r"f:1: messages\[0\].content: is not JSON"),
        (
            {"conversations": [said("function_call", "[1]")]},
            r"messages\[0\].content is '\[1\]'; expected a call as JSON, with name and",
        ),
        ({"conversations": [], "system": 3}, "f:1: system is an int; expected a string or null"),
    ],
)
def test_other_shapes_than_sharegpt_are_refused(row, message):
    with pytest.raises(UserError, match=message):
        mapped(row, "sharegpt")


def test_alpaca_conversation():
    row = {"instruction": "Add.", "input": "2 2", "output": "4", "id": 7}
    assert mapped(row, "alpaca") == {"messages": [{"role": "user", "content": "Add.\n2 2"}, REPLY], "id": 7}
    assert mapped({**row, "input": "", "instruction": "2+2?"}, "alpaca") == {**CHAT, "id": 7}
    past = {"system": "Count.", "history": [["1+1?", "2"], ["1+2?", "3"]]}
    assert mapped({"instruction": "2+2?", "input": None, "output": "4", **past}, "alpaca")["messages"] == [
        SYSTEM,
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "3"},
        USER,
        REPLY,
    ]


def test_alpaca_preference():
    row = {"instruction": "2+2?", "chosen": "4", "rejected": "5", "system": "Count."}
    assert mapped(row, "alpaca") == {"chosen": [SYSTEM, USER, REPLY], "rejected": [SYSTEM, USER, OTHER]}


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"instruction": "x"},
            "f:1: has no output but the columns instruction; columns=alpaca expects instruction, and",
        ),
        ({"question": "x"}, "f:1: has no instruction and no output but the columns question; .*; rename the columns"),
        ({"instruction": "x", "output": 4}, "f:1: output is an int; expected a string or null"),
        (
            {"instruction": "x", "output": "y", "history": [["a"]]},
            r"f:1: history\[0\] is \['a'\]; expected a pair of texts: user, assistant",
        ),
    ],
)
def test_other_shapes_than_alpaca_are_refused(row, message):
    with pytest.raises(UserError, match=message):
        mapped(row, "alpaca")


def test_unknown_columns_are_refused():
    with pytest.raises(
        UserError, match="f: columns='chatml' is unknown; use one of smoltalk2, alpaca, gsm8k, sharegpt"
    ):
        mapped(CHAT, "chatml")


def test_berkeley_types_become_json_schema():
    properties = {
        "type": {"type": "dict", "properties": {"x": {"type": "float", "default": {"type": "float"}}}},
        "pair": {"type": "tuple", "items": {"type": "any", "description": "a dict"}},
        "name": {"type": "string", "enum": ["float"]},
    }
    standard = {
        "type": {"type": "object", "properties": {"x": {"type": "number", "default": {"type": "float"}}}},
        "pair": {"type": "array", "items": {"description": "a dict"}},
        "name": {"type": "string", "enum": ["float"]},
    }
    before = {"name": "any", "parameters": {"type": "dict", "properties": properties, "required": ["type"]}}
    after = {"name": "any", "parameters": {"type": "object", "properties": standard, "required": ["type"]}}
    assert mapped({**CHAT, "tools": [before]}) == {**CHAT, "tools": [after]}
    wrapped = {"type": "function", "function": before}
    assert json_schema_tool(wrapped) == {"type": "function", "function": after}
    assert json_schema_tool(json_schema_tool(wrapped)) == json_schema_tool(wrapped)


@pytest.mark.parametrize("name", ["simple_questions", "multiple_questions"])
def test_berkeley_functions_of_a_file_become_json_schema(rows_file, name):
    kinds, standard = set(), {"object", "array", "string", "integer", "number", "boolean"}
    for _, row in read_rows(Source(path=str(rows_file(name)))):
        tools = as_row(Row({**CHAT, "tools": row["function"]}, "f", 1), Source(path="f"))["tools"]
        kinds |= set(re.findall(r'"type": "(\w+)"', json.dumps(tools)))
        with pytest.raises(UserError, match=r"are Berkeley function-calling prompts, .* rename \{function: tools\}"):
            validate_row(row, row.where)
    assert kinds and kinds <= standard


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    "row, shape",
    [
        ({"messages": [USER, REPLY], "source": "mid"}, "messages"),
        ({**CHAT, "chat_template_kwargs": {"enable_thinking": True}, "source": "sft"}, "messages"),
        ({"messages": [USER, CALL, {"role": "tool", "content": "1"}], "tools": [{"name": "f"}]}, "messages"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]}, "messages"),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER], "prompt": "2+2?"}, "preference"),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER], "prompt": [USER]}, "preference"),
        ({"text": "words"}, "text"),
        ({"messages": None, "text": "words", "chosen": None, "tools": None}, "text"),
        ({**CHAT, "chosen": None, "rejected": None}, "messages"),
        ({"messages": [REPLY, USER, REPLY]}, "messages"),
        ({"messages": [SYSTEM, USER, CALL, RESULT, RESULT, REPLY, USER, RESULT, REPLY]}, "messages"),
        ({"messages": [USER, {**REPLY, "content": "<tool_call>{}</tool_call>"}, RESULT, REPLY]}, "messages"),
        ({"messages": [USER, {**REPLY, "content": "", "reasoning_content": "2 and 2"}]}, "messages"),
        ({"messages": [{**SYSTEM, "content": ""}, USER, CALL, {**RESULT, "content": ""}, REPLY]}, "messages"),
        ({**called(name="f"), "tools": [{"name": "f", "parameters": {"type": "object"}}]}, "messages"),
        (called(name="f", arguments=""), "messages"),
        (called(name="f", arguments='{"x": 1}'), "messages"),
        ({"messages": [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": {}}}]}, "messages"),
    ],
)
def test_known_shapes(row, shape):
    assert validate_row(mapped(row), "f:1") == shape


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"question": 1, "answer": 2},
            "f:1: has the columns question, answer; expected messages, or chosen and rejected",
        ),
        ({"messages": []}, "f:1: messages is empty; expected a list of messages, each with role and content"),
        ({"messages": "hi"}, "f:1: messages is a str; expected a list of messages"),
        ({"messages": ["hi"]}, r"f:1: messages\[0\] is a str; expected an object with role and content"),
        ({"messages": [{"content": "x"}]}, r"f:1: messages\[0\] has no role, only content; expected role and content"),
        (
            {"messages": [USER, {"role": "assistant"}]},
            r"f:1: messages\[1\] has no content; expected a string \(null only",
        ),
        (
            {"messages": [{"role": "user", "content": 4}]},
            r"f:1: messages\[0\].content is an int; expected a string or a",
        ),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            r"messages\[0\].role is 'human'; expected one of system, user",
        ),
        ({"messages": [USER]}, "f:1: messages has no assistant turn; expected at least one to train on"),
        (
            {"chosen": [USER, REPLY, USER], "rejected": [USER, REPLY, OTHER]},
            "f:1: chosen has no assistant turn after the shared prompt; there is nothing to prefer",
        ),
        ({"chosen": [USER, REPLY], "rejected": [USER, SYSTEM]}, r"f:1: rejected\[1\] is a system turn after other"),
        ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "f:1: chosen and rejected are equal; expected two"),
        (
            {"chosen": [REPLY], "rejected": [OTHER], "prompt": [USER]},
            "f:1: chosen and rejected do not share a prompt; expected",
        ),
        ({"chosen": [USER, REPLY], "rejected": [OTHER], "prompt": "x"}, "chosen and rejected do not share a prompt"),
        (
            {"chosen": [USER, REPLY], "rejected": [USER, OTHER], "prompt": 3},
            "f:1: prompt is an int; expected a string or",
        ),
        ({"chosen": "a", "rejected": "b"}, "f:1: chosen is a str; expected a list of messages"),
        ({"text": ""}, "f:1: text is empty; expected a string with content, or delete the row"),
        ({"text": 3}, "f:1: text is an int; expected a string with content"),
        ({"text": None, "x": 1}, r"f:1: has the columns text \(null\), x; expected messages, .*; rename the columns"),
        ({"conversations": [said("human", "x")]}, "f:1: has the columns conversations; .*ShareGPT; set columns: share"),
        ({"messages": [said("human", "x")]}, r"messages\[0\] has no role, only from, value; .*; set columns: sharegpt"),
        (
            {"instruction": "x", "output": "y"},
            "f:1: has the columns instruction, output; .* Alpaca; set columns: alpaca",
        ),
        ({"messages": [None]}, r"f:1: messages\[0\] is null; expected an object with role and content"),
        ({"messages": [{**USER, "content": None}, REPLY]}, r"f:1: messages\[0\] has no content; expected a string"),
        (
            {"messages": [{**USER, "content": " "}, REPLY]},
            r"f:1: messages\[0\] is an empty user turn; expected content;",
        ),
        (
            {"messages": [USER, {**REPLY, "content": [""], "tool_calls": []}]},
            r"f:1: messages\[1\] is an empty assistant turn; expected content or tool_calls; fill it or delete the row",
        ),
        (
            {"messages": [{**USER, "content": ["x", {"type": "image", "image": "a.png"}]}, REPLY]},
            r"f:1: messages\[0\].content\[1\]={'type': 'image', .* is not a text part; only text can be trained on",
        ),
        (
            {"messages": [SYSTEM, SYSTEM, USER, REPLY]},
            r"messages\[1\] is a second system turn; .*; join its text to the",
        ),
        (
            {"messages": [USER, SYSTEM, REPLY]},
            r"messages\[1\] is a system turn after other turns; expected one at most",
        ),
        ({"messages": [SYSTEM, REPLY]}, "f:1: messages has no assistant turn after a user turn; expected a reply to"),
        ({"messages": [REPLY, USER]}, "f:1: messages has no assistant turn after a user turn; expected a reply to"),
        (
            {"chosen": [SYSTEM, REPLY], "rejected": [SYSTEM, OTHER]},
            "f:1: chosen has no assistant turn after a user turn",
        ),
        (
            {"messages": [USER, RESULT, REPLY]},
            r"f:1: messages\[1\] is a tool turn without an assistant's call before it; .*; add the call or delete",
        ),
        ({"messages": [USER, REPLY, RESULT, REPLY]}, r"messages\[2\] is a tool turn without an assistant's call"),
        (
            called(name="f", arguments="x=1"),
            r"messages\[1\].tool_calls\[0\].arguments: is not JSON .*; expected a JSON",
        ),
        (
            called(name="f", arguments="[1]"),
            r"tool_calls\[0\].arguments is a list; expected a JSON object of names and",
        ),
        (called(name="f", arguments="[]"), r"tool_calls\[0\].arguments is a list; expected a JSON object of names and"),
        (called(name="f", arguments='{"x": 1, "x": 2}'), "arguments: holds the key 'x' twice in one object"),
        (called(arguments={}), r"f:1: messages\[1\].tool_calls\[0\] names no function; expected an object with name"),
        ({"messages": [USER, {**REPLY, "tool_calls": {}}]}, r"messages\[1\].tool_calls is a dict; expected a list of"),
        ({**CHAT, "tools": ["f"]}, r"f:1: tools\[0\] is a str; expected a JSON schema, an object with name"),
        ({**CHAT, "tools": "[]"}, "f:1: tools is a str; expected a list of JSON schemas or null"),
        ({**CHAT, "chat_template_kwargs": []}, "f:1: chat_template_kwargs is a list; expected an object or null"),
    ],
)
def test_broken_rows_are_refused(row, message):
    with pytest.raises(UserError, match=message) as error:
        validate_row(row, "f:1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("mid", "messages"),
        ("sft", "messages"),
        ("preference", "preference"),
        ("tools", "messages"),
        ("tool_pairs", "preference"),
    ],
)
def test_rows_of_files_are_accepted(rows_file, name, shape):
    rows, count = list(read_rows(Source(path=str(rows_file(name))))), len(rows_file(name).read_bytes().splitlines())
    assert [validate_row(as_row(row, Source()), row.where) for _, row in rows] == [shape] * count


@pytest.mark.parametrize("template", ["smollm3", "chatml"])
def test_templates_render_a_conversation_that_the_assistant_opens(template):
    text = render(load_template(template), [REPLY, USER, OTHER], today="1 May 2025")
    turns = re.findall(r"<\|im_start\|>(user|assistant)\n(.*?)<\|im_end\|>", text)
    assert turns == [("assistant", "4"), ("user", "2+2?"), ("assistant", "5")]
