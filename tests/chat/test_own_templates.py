"""The chat templates of other families, with their quirks: the replies that train, or the line that refuses the row."""

import pytest

from smolpost.chat.fates import Fate
from smolpost.chat.layout import Policy
from smolpost.chat.masks import encode, encode_pair, encode_prompt
from smolpost.chat.render import render
from smolpost.errors import UserError
from tests.model_families import MODEL_FAMILIES

DAY = "08 July 2025"
THINK = "<think>\nhm\n</think>\n"
EVERY, LAST = Policy(), Policy(last_turn_only=True)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def tokenizer_of(family: str):
    if MODEL_FAMILIES[family].template is None:
        pytest.skip(f"the installed trl has no chat template of {family}")
    tokenizer = MODEL_FAMILIES[family].tokenizer()
    tokenizer.chat_template = MODEL_FAMILIES[family].template
    return tokenizer


def trained(tokenizer, messages: list[dict], policy: Policy = EVERY, **kwargs) -> list[str]:
    """The stretches that train, whose ids are those of the whole text and follow the prompt's."""
    encoded = encode(tokenizer, messages, template_kwargs=kwargs, today=DAY, policy=policy)
    text = render(tokenizer, messages, template_kwargs=kwargs, today=DAY)
    assert encoded.input_ids == tokenizer.encode(text, add_special_tokens=False)
    prompt = encode_prompt(tokenizer, messages[:-1], template_kwargs=kwargs, today=DAY)
    assert encoded.input_ids[: len(prompt)] == prompt
    stretches, before = [], None
    for i, fate in zip(encoded.input_ids, encoded.fates, strict=True):
        if fate == Fate.TRAINED:
            if before != Fate.TRAINED:
                stretches.append([])
            stretches[-1].append(i)
        before = fate
    return [tokenizer.decode(ids) for ids in stretches]


@pytest.mark.parametrize("family", ["llama3", "gemma3", "mistral"])
def test_replies_train_with_their_stop_token(family):
    tokenizer, end = tokenizer_of(family), MODEL_FAMILIES[family].turn_end
    system = {"role": "system", "content": "Be brief."}
    turns = [system, user(" What? "), reply("One.\n\nTwo é ☃"), user("And?"), reply(f"{THINK}No.")]
    assert trained(tokenizer, turns) == [f"One.\n\nTwo é ☃{end}", f"{THINK}No.{end}"]
    assert trained(tokenizer, turns[1:], LAST, enable_thinking=False) == [f"{THINK}No.{end}"]
    assert tokenizer.decode(encode(tokenizer, turns, today=DAY).input_ids).count("Be brief.") == 1


def test_qwen3_writes_a_think_block_of_its_own():
    tokenizer = tokenizer_of("qwen3")
    assert trained(tokenizer, [user("A?"), reply("B.")]) == ["<think>\n\n</think>\n\nB.<|im_end|>"]
    assert trained(tokenizer, [user("A?"), reply("B.")], enable_thinking=False) == ["B.<|im_end|>"]
    assert trained(tokenizer, [user("A?"), reply(f"{THINK}B.")]) == ["<think>\nhm\n</think>\n\nB.<|im_end|>"]


def test_qwen3_removes_earlier_reasoning_so_the_last_reply_alone_trains():
    tokenizer = tokenizer_of("qwen3")
    turns = [user("A?"), reply(f"{THINK}B."), user("C?"), reply(f"{THINK}D.")]
    with pytest.raises(UserError, match=r"turns differently when later turns follow; .*last_turn_only=true"):
        trained(tokenizer, turns)
    assert trained(tokenizer, turns, LAST) == ["<think>\nhm\n</think>\n\nD.<|im_end|>"]
    plain = [user("A?"), reply("B."), user("C?"), reply("D.")]
    assert trained(tokenizer, plain, LAST, enable_thinking=False) == ["D.<|im_end|>"]
    pair = encode_pair(tokenizer, turns, [*turns[:3], reply("E.")], today=DAY)
    assert tokenizer.decode(pair.rejected_ids) == "<think>\n\n</think>\n\nE.<|im_end|>"
    with pytest.raises(UserError, match=r"messages\[3\]: the chat template asks for this reply with .*enable_thinking"):
        trained(tokenizer, turns, LAST, enable_thinking=False)


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_roles_that_do_not_alternate_are_refused(family):
    with pytest.raises(UserError, match=r"messages\[1\]: .*must alternate"):
        trained(tokenizer_of(family), [user("A?"), user("B?"), reply("C.")])


def test_a_system_message_that_goes_when_a_reply_follows_is_refused():
    """As Mistral 7B's template of version 0.3 has it."""
    tokenizer = tokenizer_of("mistral")
    tokenizer.chat_template = tokenizer.chat_template.replace("if loop.first", "if loop.last")
    with pytest.raises(
        UserError, match=r"the turns before messages\[2\] differently when it follows; use a template that"
    ):
        trained(tokenizer, [{"role": "system", "content": "Be brief."}, user("A?"), reply("B.")])
