"""The door of all rows: keys that change meaning are honoured or refused, nulls are missing, shapes become ours."""

import json
import re

import pytest

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data.columns import as_row, row_for
from smolpost.data.rows import Row, without_nulls
from smolpost.data.validate import validate_row
from smolpost.errors import UserError
from smolpost.schema import RELEASE_DAY, Source

USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
OTHER, SYSTEM = {**REPLY, "content": "5"}, {"role": "system", "content": "Count."}
CHAT = {"messages": [USER, REPLY]}
WEATHER = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def call(**arguments):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def mapped(row, **settings):
    """The row in our columns, which is valid and stays as it is when it is mapped again."""
    before = json.dumps(row)
    source = Source(path="f", **settings)
    found = as_row(without_nulls(Row(row, "f", 1)), source)
    assert json.dumps(row) == before
    validate_row(found, found.where)
    assert as_row(found, Source(path="f")) == found
    return found


def refusal(row, **settings):
    with pytest.raises(UserError) as error:
        mapped(row, **settings)
    assert "\n" not in str(error.value) and str(error.value).startswith("f:1: ")
    return str(error.value)


def chat(*turns, **row):
    return {"messages": list(turns), **row}


# ---------------------------------------------------------------- marks


@pytest.mark.parametrize("key", ["train", "training", "trainable", "loss", "loss_mask", "weight"])
@pytest.mark.parametrize("no, yes", [(False, True), (0, 1), (0.0, 1.0)])
def test_marks_of_turns_leave_them_out(key, no, yes):
    row = mapped(chat(USER, {**OTHER, key: no}, USER, {**REPLY, key: yes}))
    assert row["messages"] == [USER, {**OTHER, "train": False}, USER, {**REPLY, "train": True}]
    assert not row.unread
    assert mapped({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "4", key: no}]},
                  columns="sharegpt")["messages"][1] == {**REPLY, "train": False}  # fmt: skip


def test_marks_that_say_no_or_contradict_are_refused():
    assert "weight=0.5 is not a mark; expected true, false, 1 or 0" in refusal(chat(USER, {**REPLY, "weight": 0.5}))
    assert "train=True, weight=0 disagree" in refusal(chat(USER, {**REPLY, "train": True, "weight": 0}))
    assert "loss='no' is not a mark" in refusal(chat(USER, {**REPLY, "loss": "no"}))


def test_marks_of_rows_count_for_their_turns():
    row = mapped(chat(USER, OTHER, USER, REPLY, loss_mask=[0, 0, 0, 1]))
    left_out = [{**turn, "train": False} for turn in (USER, OTHER, USER)]
    assert row["messages"] == [*left_out, REPLY] and not row.unread
    assert all(turn["train"] is False for turn in mapped(chat(USER, REPLY, train=0))["messages"])
    assert mapped(chat(USER, REPLY, train=True))["messages"] == [USER, REPLY]
    assert mapped(chat(USER, REPLY, loss=0.73)).unread == ("loss",)  # a measurement
    assert mapped(chat(USER, REPLY, train="split-1")).unread == ("train",)
    assert "weight=70 may be meant as the weight of the row's loss" in refusal(chat(USER, REPLY, weight=70))
    assert "loss_mask has 3 marks for 2 turns" in refusal(chat(USER, REPLY, loss_mask=[0, 1, 1]))
    assert mapped(chat(USER, REPLY, weight=70), rename={"weight": "kilos"}).unread == ("kilos",)


@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_undesired_replies_are_refused(key):
    assert f"{key}=false marks an undesired reply" in refusal({**CHAT, key: False})
    assert not mapped({**CHAT, key: True}).unread
    assert mapped({**CHAT, key: "math"}).unread == (key,)


# ---------------------------------------------------------------- keys that nobody reads


@pytest.mark.parametrize("key", ["images", "image", "videos", "video", "audios", "audio"])
def test_what_is_no_text_is_refused_by_name(key):
    assert f"{key}=['a.jpg'] would be lost: only text" in refusal({**CHAT, key: ["a.jpg"]})
    assert "messages[0]: " in refusal(chat({**USER, key: ["a.jpg"]}, REPLY))
    for nothing in ([], "", None):
        assert not mapped({**CHAT, key: nothing}).unread


@pytest.mark.parametrize(
    "key, value",
    [
        ("train_detail", [{"begin_offset": 0, "end_offset": 3, "train": False}]),
        ("mask", 1),
        ("loss_scale", 0.5),
        ("reasoning_details", [{"text": "hm"}]),
        ("channel", "analysis"),
    ],
)
def test_keys_of_turns_that_change_meaning_are_refused(key, value):
    assert f"{key}=" in refusal(chat(USER, {**REPLY, key: value}))


def test_other_keys_are_named():
    row = mapped(chat({**USER, "id": 3, "ts": None}, {**REPLY, "model": "x", "name": "bot"}, uuid="u", score=0.5, n=[]))
    assert row.unread == ("messages.id", "messages.model", "score", "uuid")
    noted = chat(USER, {"role": "assistant", "tool_calls": [{**call(x=1), "index": 2, "id": "c1"}]})
    assert mapped(noted).unread == ("messages.tool_calls.index",)


def test_a_stage_reads_one_of_messages_and_pair():
    row = Row({**CHAT, "chosen": [USER, REPLY], "rejected": [USER, OTHER], "score_chosen": 9.0}, "f", 1)
    sft, apo = (row_for(row, Source(path="f"), layout) for layout in ("documents", "pairs"))
    assert dict(sft) == {**CHAT, "score_chosen": 9.0} and sft.unread == ("chosen", "rejected", "score_chosen")
    assert "messages" not in apo and apo.unread == ("messages", "score_chosen")
    assert validate_row(sft, "f") == "messages" and validate_row(apo, "f") == "preference"


# ---------------------------------------------------------------- nulls


def test_nulls_are_missing_at_every_depth():
    filled = {
        "messages": [
            {**USER, "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call(x=1, y=None, z={"a": None, "b": 2})]},
        ],
        "tools": [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "int"}, "y": None}}}],
        "chat_template_kwargs": {"enable_thinking": None, "python_tools": []},
        "text": None,
        "chosen": None,
    }
    row = mapped(filled)
    assert row["messages"] == [USER, {"role": "assistant", "tool_calls": [call(x=1, z={"b": 2})]}]
    assert row["tools"][0]["parameters"]["properties"].keys() == {"x"}
    assert row.keys() == {"messages", "tools", "chat_template_kwargs"}
    assert row["chat_template_kwargs"] == {"python_tools": []}
    written = chat(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"y": null}'}]})
    assert mapped(written)["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"y": null}'


# ---------------------------------------------------------------- calls and tools


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args", "kwargs"])
def test_arguments_are_found_under_their_other_names(key):
    for given in ({"x": 1}, '{"x": 1}'):
        for written in ({"name": "f", key: given}, {"type": "function", "function": {"name": "f", key: given}}):
            row = mapped(chat(USER, {"role": "assistant", "tool_calls": [written]}, tools=[WEATHER]))
            assert row["messages"][1]["tool_calls"] == [
                {"type": "function", "function": {"name": "f", "arguments": given}}
            ]
    assert mapped(chat(USER, {"role": "assistant", "function_call": {"name": "f", key: {"x": 1}}}))["messages"][1] == {
        "role": "assistant",
        "tool_calls": [call(x=1)],
    }


def test_a_call_without_arguments_is_refused_unless_its_function_has_none():
    bare = chat(USER, {"role": "assistant", "tool_calls": [{"name": "f"}]})
    assert "tool_calls[0] calls f without arguments; expected" in refusal(bare)
    city = {"type": "object", "properties": {"city": {"type": "string"}}}
    assert "without arguments" in refusal({**bare, "tools": [{"name": "f", "parameters": city}]})
    for tool in (WEATHER, {"name": "f"}, {"name": "f", "parameters": {"type": "object", "properties": {}}}):
        mapped({**bare, "tools": [tool]})
    mapped(chat(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}))  # the remedy
    twice = chat(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}, "input": {"x": 1}}]})
    assert "tool_calls[0] has arguments and input; expected the arguments in one" in refusal(twice)


def test_tools_of_messages_are_the_rows():
    tools = [{"name": "f", "parameters": {"type": "object"}}]
    for key, value in (("tools", json.dumps(tools)), ("functions", json.dumps(tools)), ("tools", tools)):
        assert mapped(chat({**SYSTEM, key: value}, USER, REPLY))["tools"] == tools
    assert mapped(chat(USER, REPLY, functions=tools))["tools"] == tools
    assert "have different tools" in refusal(chat({**SYSTEM, "tools": tools}, USER, REPLY, tools=[{"name": "g"}]))


def test_olmo_calls_are_read():
    written = 'f(x=1, y="a")\nf(x=[2])'
    row = mapped(chat(USER, {**REPLY, "function_calls": written}, {"role": "environment", "content": "3"}, REPLY))
    assert row["messages"][1]["tool_calls"] == [call(x=1, y="a"), call(x=[2])]
    assert row["messages"][2] == {"role": "tool", "content": "3"}
    assert "function_calls='f(1)' has an argument without a name" in refusal(
        chat(USER, {**REPLY, "function_calls": "f(1)"})
    )
    assert "function_calls='f(x=' cannot be read" in refusal(chat(USER, {**REPLY, "function_calls": "f(x="}))


# ---------------------------------------------------------------- content, reasoning, roles


@pytest.mark.parametrize(
    "reply",
    [
        {"content": "4", "reasoning_content": "2 and 2"},
        {"content": "4", "reasoning": "2 and 2"},
        {"content": "4", "thinking": "<think>\n2 and 2\n</think>"},
        {"content": [{"type": "reasoning", "text": "2 and 2"}, {"type": "text", "text": "4"}]},
        {"content": [{"type": "thinking", "thinking": "2 and 2"}, {"type": "output_text", "text": "4"}]},
        {"content": [{"type": "thinking", "thinking": "2 and"}, {"type": "reasoning", "text": " 2"}, "4"]},
    ],
)
def test_reasoning_is_found_wherever_it_stands(reply):
    row = mapped(chat(USER, {"role": "assistant", **reply}))
    assert row["messages"][1]["content"] == "4"
    assert row["messages"][1]["reasoning_content"].replace("\n", "") == "2 and 2" and not row.unread


def test_reasoning_in_two_places_is_refused_unless_it_is_the_same():
    inline = "<think>\n2 and 2\n</think>\n4"
    assert mapped(chat(USER, {**REPLY, "content": inline, "reasoning": "2 and 2"}))["messages"][1] == {
        "role": "assistant",
        "content": inline,
    }
    assert "has reasoning beside its content and another think block" in refusal(
        chat(USER, {**REPLY, "content": inline, "reasoning": "other"})
    )
    assert "reasoning and thinking have different reasoning" in refusal(
        chat(USER, {**REPLY, "reasoning": "a", "thinking": "b"})
    )


@pytest.mark.parametrize("kind", ["image_url", "tool_use", "tool_result", "redacted_thinking", "input_audio"])
def test_other_parts_are_refused_by_name(kind):
    assert f"'type': '{kind}'" in refusal(chat(USER, {**REPLY, "content": [{"type": kind, "text": "x"}]}))


def test_a_refusal_is_what_the_assistant_said():
    assert (
        mapped(chat(USER, {"role": "assistant", "content": None, "refusal": "No."}))["messages"][1]["content"] == "No."
    )
    assert "both content and refusal" in refusal(chat(USER, {**REPLY, "refusal": "No."}))


@pytest.mark.parametrize(
    "role, ours",
    [("developer", "system"), ("human", "user"), ("gpt", "assistant"), ("model", "assistant")],
)
def test_other_names_of_roles_are_known(role, ours):
    turns = {"system": [{**SYSTEM, "role": role}, USER, REPLY], "user": [{**USER, "role": role}, REPLY]}
    turns["assistant"] = [USER, {**REPLY, "role": role}]
    assert [turn["role"] for turn in mapped(chat(*turns[ours]))["messages"]][-len(turns[ours]) :] == [
        "system", "user", "assistant"
    ][-len(turns[ours]) :]  # fmt: skip


def test_a_source_names_further_roles():
    row = chat({**USER, "role": "client"}, {**REPLY, "role": "bot"})
    assert "role is 'client'; expected one of system, user, assistant, tool" in refusal(row)
    assert "roles: {client: user}" in refusal(row)
    assert mapped(row, roles={"client": "user", "bot": "assistant"}) == CHAT
    said = {"conversations": [{"from": "client", "value": "2+2?"}, {"from": "bot", "value": "4"}]}
    assert mapped(said, columns="sharegpt", roles={"client": "user", "bot": "assistant"}) == CHAT


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_turns_of_calls(role):
    written = '<think>\nhm\n</think>\n{"name": "f", "arguments": {"x": 1}}'
    again = '{"name": "f", "parameters": {"x": 2}}'
    row = mapped(chat(USER, {"role": role, "content": written}, {"role": role, "content": again},
                      {"role": "tool_response", "content": "1"}, REPLY))  # fmt: skip
    assert row["messages"][1:3] == [
        {"role": "assistant", "reasoning_content": "hm", "tool_calls": [call(x=1), call(x=2)]},
        {"role": "tool", "content": "1"},
    ]


def test_a_conversation_that_ends_in_two_user_turns():
    row = chat(USER, REPLY, USER, {**USER, "content": "<think>\nx\n</think>\n4"})
    assert "ends in two user turns; the last one looks like a reply" in refusal(row)
    assert "last_user_is_reply: true" in refusal(row)
    assert mapped(row, last_user_is_reply=True)["messages"][-1]["role"] == "assistant"
    assert mapped(CHAT, last_user_is_reply=True) == CHAT


# ---------------------------------------------------------------- shapes


def test_system_columns():
    for key in ("system", "system_prompt", "system_message"):
        row = mapped({**CHAT, key: "Count."})
        assert row == {"messages": [SYSTEM, USER, REPLY]} and not row.unread
        assert mapped({"messages": [SYSTEM, USER, REPLY], key: "Count."}) == {"messages": [SYSTEM, USER, REPLY]}
        assert mapped({**CHAT, key: ""}) == CHAT
        assert f"has the column {key} and another system turn" in refusal(chat(SYSTEM, USER, REPLY, **{key: "Other."}))
    pair = mapped({"system": "Count.", "prompt": "2+2?", "chosen": [USER, REPLY], "rejected": [USER, OTHER]})
    assert (pair["chosen"], pair["rejected"]) == ([SYSTEM, USER, REPLY], [SYSTEM, USER, OTHER])


@pytest.mark.parametrize("mode", ["on", "off"])
def test_llama_nemotron_rows(mode):
    row = {
        "input": [USER],
        "output": "4",
        "reasoning": mode,
        "system_prompt": f"detailed thinking {mode}",
        "license": "x",
    }
    found = mapped(row)
    assert found["messages"] == [USER, REPLY] and found.unread == ("license",)
    assert found["chat_template_kwargs"] == {"enable_thinking": mode == "on"}
    assert "disagree on whether the reply thinks" in refusal({**row, "enable_thinking": mode == "off"})


@pytest.mark.parametrize("prompt", ["2+2?", [USER], json.dumps([USER])])
@pytest.mark.parametrize("completion", ["4", [REPLY]])
def test_trl_prompt_and_completion(prompt, completion):
    assert mapped({"prompt": prompt, "completion": completion}) == {**CHAT, "completion_turns": 1}
    history = mapped({"prompt": [USER, OTHER, USER], "completion": completion})
    assert history["messages"] == [USER, {**OTHER, "train": False}, USER, REPLY]  # the completion alone trains


def test_turns_under_alpacas_names():
    row = {"prompt": [USER], "completion": [REPLY]}
    names = {"prompt": "instruction", "completion": "output"}
    assert mapped(row, columns="alpaca", rename=names) == {**CHAT, "completion_turns": 1}
    assert "has input beside an instruction that is a list of turns" in refusal(
        {**row, "input": "x"}, columns="alpaca", rename=names
    )


def test_xlam_rows():
    tool = {"name": "f", "description": "d", "parameters": {
        "city": {"type": "str", "description": "c"}, "days": {"type": "List[int], optional", "default": 3},
    }}  # fmt: skip
    row = mapped({"id": 1, "query": "2+2?", "answers": json.dumps([{"name": "f", "arguments": {"city": "Oslo"}}]),
                  "tools": json.dumps([tool])})  # fmt: skip
    assert row["messages"] == [USER, {"role": "assistant", "tool_calls": [call(city="Oslo")]}]
    assert row["tools"][0]["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "c"},
            "days": {"type": "array", "default": 3},
        },
        "required": ["city"],
    }


def test_json_as_text_is_read_in_every_shape():
    row = {"messages": json.dumps([USER, {**REPLY, "tool_calls": None}]), "tools": "[]", "chat_template_kwargs": "{}"}
    assert mapped(row) == {**CHAT, "chat_template_kwargs": {}}
    said = json.dumps([{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}])
    assert mapped({"conversations": said}, columns="sharegpt") == CHAT
    pair = {"chosen": json.dumps([USER, REPLY]), "rejected": json.dumps([USER, OTHER]), "prompt": "2+2?"}
    assert mapped(pair)["rejected"] == [USER, OTHER]
    listed = mapped({**CHAT, "tools": [json.dumps(WEATHER)]})
    assert listed["tools"] == [WEATHER]
    assert "f:1: messages: is not JSON" in refusal({"messages": '[{"role"'})


def test_conversations_of_role_and_content_need_no_setting():
    for columns in ("smoltalk2", "sharegpt"):
        assert mapped({"conversations": CHAT["messages"]}, columns=columns) == CHAT


def test_ms_swift_pairs():
    row = mapped({**CHAT, "rejected_response": "5"})
    assert (row["chosen"], row["rejected"]) == ([USER, REPLY], [USER, OTHER])


@pytest.mark.parametrize("asked, answered", [("query", "response"), ("question", "answer"), ("input", "output")])
def test_the_remedy_for_a_question_and_its_answer_works(asked, answered):
    row = {asked: "2+2?", answered: "4"}
    remedy = re.search(r"columns: alpaca and rename {(\w+): instruction, (\w+): output}", refusal(row))
    assert mapped(row, columns="alpaca", rename={remedy[1]: "instruction", remedy[2]: "output"}) == CHAT


# ---------------------------------------------------------------- what trains


def test_what_a_row_says_is_what_trains():
    """From files as people have them to the trained text, by hand."""
    tokenizer = build_tokenizer(["abc"], kind="bpe", vocab_size=300, template="smollm3")

    def trained(row, **settings):
        row = mapped(row, **settings)
        kwargs = row.get("chat_template_kwargs")
        encoded = encode(tokenizer, row["messages"], template_kwargs=kwargs, tools=row.get("tools"), today=RELEASE_DAY)
        ids = [i for i, fate in zip(encoded.input_ids, encoded.fates, strict=True) if fate == Fate.TRAINED]
        return tokenizer.decode(ids)

    end = "<|im_end|>"
    assert trained(chat(USER, {**OTHER, "weight": 0}, USER, {**REPLY, "weight": 1})) == "4" + end
    assert trained(chat(USER, {**REPLY, "thinking": "hm"})) == f"<think>\nhm\n</think>\n4{end}"
    crlf = "<think>\r\nhm\r\n</think>\r\n\r\n4"
    no_think = {"chat_template_kwargs": {"enable_thinking": False}}
    assert trained(chat(USER, {**REPLY, "content": crlf}, **no_think)) == "4" + end
    sent = chat(USER, {"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"x": 1, "y": None}}]})
    assert trained(sent) == f'<tool_call>{{"name": "f", "arguments": {{"x": 1}}}}</tool_call>{end}'
