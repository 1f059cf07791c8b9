import copy
import json

import pytest

from smolpost.chat.masks import encode
from smolpost.chat.render import clean_messages, load_template, render, render_spans, template_hash
from smolpost.errors import UserError

DAY = "01 July 2025"
USER = {"role": "user", "content": "hi"}


def test_load_template_by_name_and_by_path(tmp_path):
    assert "<|im_start|>" in load_template("smollm3")
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages|length }}")
    assert load_template(own) == load_template(str(own)) == "{{ messages|length }}"


def test_unknown_template_names_the_choices(tmp_path):
    with pytest.raises(UserError, match=r"'smolm3' does not exist; use one of chatml, smollm3, smollm3_published"):
        load_template("smolm3")
    with pytest.raises(UserError, match="does not exist"):
        load_template(tmp_path / "absent.jinja")
    with pytest.raises(UserError, match="does not exist"):
        load_template(__file__)


def test_template_hash_matches_known_value():
    # sha256("abc") = ba7816bf 8f01cfea ... (FIPS 180-2, appendix B.1)
    assert template_hash("abc") == "ba7816bf8f01cfea"
    assert template_hash(load_template("smollm3")) != template_hash(load_template("chatml"))


def test_render_equals_the_stock_call(bpe, rows):
    for row in rows("tools", 5):
        messages = row["messages"]
        for message in messages:
            for call in message.get("tool_calls", []):
                # Servers hand parsed arguments to the template.
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        for prompt in (True, False):
            stock = bpe.apply_chat_template(
                messages, tools=row["tools"], tokenize=False, today=DAY, add_generation_prompt=prompt
            )
            assert render(bpe, messages, tools=row["tools"], today=DAY, add_generation_prompt=prompt) == stock


def test_messages_are_left_as_they_were(bpe):
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    encode(bpe, messages, today=DAY)
    assert messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
    ]


def test_keys_filled_with_none_count_as_missing(bpe):
    filled = [
        {**USER, "tool_calls": None, "train": None},
        {"role": "assistant", "content": "a", "tool_calls": None, "function_call": None, "reasoning": None},
    ]
    plain = [USER, {"role": "assistant", "content": "a"}]
    assert clean_messages(filled) == plain
    assert render_spans(bpe, filled, today=DAY) == render_spans(bpe, plain, today=DAY)


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"enable_thinking": "false"}, "chat_template_kwargs.enable_thinking='false' is not a boolean; use true or"),
        ({"enable_thinkng": False}, "chat_template_kwargs.enable_thinkng is not a variable a row can set; use custom"),
        ({"today": "now"}, "chat_template_kwargs.today is not a variable a row can set"),
    ],
)
def test_wrong_template_kwargs_are_refused(bpe, kwargs, complaint):
    with pytest.raises(UserError, match=complaint):
        render(bpe, [USER], template_kwargs=kwargs, today=DAY)


def test_tools_as_strings_are_refused(bpe):
    with pytest.raises(UserError, match=r"tools\[0\]='f' is not a JSON schema; pass finished strings as xml_tools"):
        render(bpe, [USER], tools=["f"], today=DAY)


def test_templates_that_cannot_be_used_are_refused(char, tmp_path):
    tokenizer = copy.deepcopy(char)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        render(tokenizer, [USER], today=DAY)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render(tokenizer, [USER], today=DAY) == "hi"
    with pytest.raises(UserError, match=r"has no \{% generation %\} tags; use smollm3 or chatml"):
        render_spans(tokenizer, [USER], today=DAY)


def test_variables_of_a_users_own_template_pass(char):
    tokenizer = copy.deepcopy(char)
    tokenizer.chat_template = "{{ tone }}"
    assert render(tokenizer, [USER], template_kwargs={"tone": "dry"}, today=DAY) == "dry"


def test_a_variable_that_nobody_gives_is_one_line_whose_remedy_helps(char):
    tokenizer = copy.deepcopy(char)
    tokenizer.chat_template = "{{ bos_token + tone + messages[0].content }}"
    with pytest.raises(UserError, match=r"^'tone' is undefined: .* has it; add it to chat_template_kwargs, or"):
        render(tokenizer, [USER], today=DAY)
    text = render(tokenizer, [USER], template_kwargs={"tone": "dry "}, today=DAY)
    assert text == "<|begin_of_text|>dry hi"
