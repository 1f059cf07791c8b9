"""Modes of rows, as the template renders them."""

import pytest

from smolpost.chat.render import render
from smolpost.data.prompts import mode_of

SHOWN = {"think": "Reasoning Mode: /think", "no_think": "Reasoning Mode: /no_think"}

PARTS = [{"type": "text", "text": "Be brief. /no_think"}]


@pytest.mark.parametrize("system", [None, "Be brief.", "Be brief. /no_think", "/think Be brief.", PARTS])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_the_mode_of_a_row_is_the_one_that_its_prompt_shows(tokenizer, system, thinking):
    messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": "hi"}]
    kwargs = {"enable_thinking": thinking}
    text = render(tokenizer, messages, template_kwargs=kwargs, today="01 July 2025")
    mode = mode_of({"messages": messages, "chat_template_kwargs": kwargs})
    assert SHOWN[mode] + "\n" in text
    assert mode_of({"chosen": messages, "rejected": messages, "chat_template_kwargs": kwargs}) == mode


def test_a_plain_text_has_no_mode():
    assert mode_of({"text": "/no_think"}) == "text"
