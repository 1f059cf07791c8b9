"""A model in this process: its replies are the engine's, and what it saw is what a saved row trains."""

import json

import pytest
import torch

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode
from smolpost.errors import UserError
from smolpost.inference.local import LocalEngine
from smolpost.schema import RELEASE_DAY
from smolpost.stages.sft import SFTStage
from smolpost.talk.conversation import CUT, INTERRUPTED, STOP, Conversation, Tools
from smolpost.talk.local import LocalSpeaker
from smolpost.talk.settings import Settings, of_generation_config
from smolpost.talk.splitter import ANSWER, THINKING
from tests.char_model import char_model
from tests.prepared import prepared

ROWS = {"enable_thinking", "custom_instructions", "python_tools", "xml_tools"}


def asked(text="ab?"):
    conversation = Conversation()
    conversation.ask(text)
    return conversation


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("seed", [0, 7])
def test_replies_are_those_of_the_engine_with_the_same_seed(tokenizer, temperature, seed):
    model = char_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2.5  # so that not every reply is cut
    speaker, conversation, pieces = LocalSpeaker("sft", model, tokenizer), asked(), []
    settings = Settings(temperature=temperature, top_p=0.9, max_new_tokens=60)
    said = speaker.reply(conversation, settings, None, seed, lambda *piece: pieces.append(piece[:2]))
    [[reply]] = LocalEngine(model, tokenizer).generate(
        [speaker.prompt_ids(conversation, True)], max_new_tokens=60, temperature=temperature, top_p=0.9, seed=seed
    )
    assert said.message["content"] == reply.text and said.num_tokens == reply.num_tokens
    assert (said.finish == CUT) is reply.cut
    assert "".join(text for _, text in pieces).strip() == reply.text.strip()


def test_the_prompts_are_the_prepared_row_that_the_conversation_becomes(rigged, chat, tokenizer, tmp_path):
    """Every token that the model saw, and its last reply, are the prepared row's; what trains are its whole replies."""
    replies = iter(["<think>\none\n</think>\nA1", "<think>\ntwo\n</think>\n\nA2 with <b>", "A3"])
    speaker, file = rigged(lambda prompt: next(replies)), tmp_path / "chats.jsonl"
    lines = ["first", "second <|im_end|> \\n", "a third"]
    session, _ = chat([speaker], lines, save=file, system="Be brief.")
    [row] = map(json.loads, file.read_text().splitlines())
    dataset, _ = prepared(SFTStage(max_seq_len=4096, packing="none"), [row], tokenizer, tmp_path)
    ids, trained = dataset[0]["input_ids"], [i for i, f in enumerate(dataset[0]["fates"]) if f == Fate.TRAINED]
    [conversation] = session.conversations
    for number in range(3):
        before = Conversation(conversation.frame, conversation.turns[: 2 * number + 1])
        prompt = speaker.prompt_ids(before, True)
        assert ids[: len(prompt)] == prompt
        assert len(prompt) in trained and len(prompt) - 1 not in trained  # a reply begins right there
    reply = tokenizer.encode("A3<|im_end|>", add_special_tokens=False)
    assert ids[len(prompt) : len(prompt) + len(reply)] == reply
    whole = "".join(turn.message["content"] + "<|im_end|>" for turn in conversation.turns if turn.said)
    assert tokenizer.decode([ids[i] for i in trained]) == whole
    assert row["source"] == "chat/sft" and row["chat_template_kwargs"].keys() == ROWS


def test_a_switched_mode_trains_the_replies_of_the_last_mode_alone(rigged, chat, tokenizer, tmp_path):
    def reply(prompt):
        return "short" if prompt.endswith("</think>\n") else "<think>\nlong\n</think>\nanswer"

    speaker, file = rigged(reply), tmp_path / "chats.jsonl"
    session, _ = chat([speaker], ["one", "/no_think", "two", "three"], save=file)
    [row] = map(json.loads, file.read_text().splitlines())
    assert row["chat_template_kwargs"]["enable_thinking"] is False
    assert [m.get("train") for m in row["messages"]] == [None, False, None, None, None, None]
    encoded = encode(tokenizer, row["messages"], template_kwargs=row["chat_template_kwargs"], today=RELEASE_DAY)
    trained = [i for i, fate in zip(encoded.input_ids, encoded.fates, strict=True) if fate == Fate.TRAINED]
    assert tokenizer.decode(trained) == "short<|im_end|>short<|im_end|>"
    before = Conversation(session.conversations[0].frame, session.conversations[0].turns[:-1])
    prompt = speaker.prompt_ids(before, False)
    assert encoded.input_ids[: len(prompt)] == prompt
    _, said = session.conversations[0].turns[-1].message, session.conversations[0].last
    assert said.mode is False and said.reasoning == ""


def test_prepare_takes_rows_with_calls_and_results(rigged, chat, tokenizer, tmp_path):
    schema = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    replies = iter(['<tool_call>{"name": "look_up", "arguments": {"word": "e"}}</tool_call>', "It is 4."])
    speaker, file = rigged(lambda prompt: next(replies)), tmp_path / "chats.jsonl"
    session, script = chat([speaker], ["go", "four"], save=file, tools=Tools(schemas=(schema,)), thinking=False)
    assert 'result of look_up(word="e")> ' in script.notes
    [row] = map(json.loads, file.read_text().splitlines())
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["tools"] == [schema] and row["messages"][2]["content"] == "four"
    dataset, _ = prepared(SFTStage(max_seq_len=4096, packing="none"), [row], tokenizer, tmp_path)
    prompt = speaker.prompt_ids(
        Conversation(session.conversations[0].frame, session.conversations[0].turns[:-1]), False
    )
    assert dataset[0]["input_ids"][: len(prompt)] == prompt and "look_up" in tokenizer.decode(prompt)


def test_thinking_and_answer_stream_apart(rigged):
    pieces = []
    said = rigged("<think>\nhm\n</think>\n4.").reply(
        asked(), Settings(), None, 0, lambda kind, text, heard: pieces.append((kind, text))
    )
    for kind, text in ((THINKING, "\nhm\n"), (ANSWER, "4.")):
        assert "".join(t for k, t in pieces if k == kind) == text
    assert (said.reasoning, said.answer, said.finish, said.mode) == ("hm", "4.", STOP, True)
    assert said.thinking_tokens == 5 and said.num_tokens == 10  # the tags are one token each


def test_ctrl_c_ends_the_reply_and_keeps_what_came(rigged):
    import signal

    from smolpost.signals import Stopped

    pieces = []

    def show(kind, text, heard):
        pieces.append(text)
        if len(pieces) == 3:
            raise Stopped(signal.SIGINT)

    said = rigged("abcdef").reply(asked(), Settings(), None, 0, show)
    assert (said.answer, said.finish, said.whole) == ("abc", INTERRUPTED, False)
    with pytest.raises(Stopped):
        rigged("abcdef").reply(asked(), Settings(), None, 0, lambda *_: (_ for _ in ()).throw(Stopped(signal.SIGTERM)))


def test_a_full_context_is_told_and_nothing_is_left_out(rigged):
    speaker = rigged("abcdef")
    length = len(speaker.prompt_ids(asked(), True))
    speaker.context = length + 3
    said = speaker.reply(asked(), Settings(), None, 0, lambda *_: None)
    assert said.answer == "abc" and said.note.startswith("cut: the conversation fills the model's context; /clear")
    speaker.context = length
    with pytest.raises(UserError, match=rf"has {length} tokens, and the model's context is {length}; .*/undo .*/clear"):
        speaker.reply(asked(), Settings(), None, 0, lambda *_: None)


def test_modes_are_the_templates(rigged, tokenizer):
    speaker, conversation = rigged("a"), Conversation()
    assert [speaker.mode(conversation, wanted) for wanted in (None, True, False)] == [True, True, False]
    conversation.with_system("Be brief. /no_think")  # the template lets its words decide
    assert speaker.mode(conversation, True) is None
    speaker.tokenizer.chat_template, own = "{{ messages[0].content }}", tokenizer.chat_template
    try:
        assert speaker.mode(Conversation(), True) is None
    finally:
        speaker.tokenizer.chat_template = own


def test_sampling_is_the_models_own_where_it_samples():
    assert of_generation_config({}) == (Settings(0.6, 0.95), [])
    assert of_generation_config({"temperature": 0.1, "top_p": 0.2}) == (Settings(0.6, 0.95), [])
    assert of_generation_config({"do_sample": True, "top_k": 64}) == (Settings(1.0, 1.0, 64), [])
    own = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "min_p": None}
    assert of_generation_config(own) == (Settings(0.7, 0.8, 20), ["repetition_penalty=1.05"])
