"""A model behind a server: its reply streams, its thinking is found under every name, and faults leave a line."""

import pytest

from smolpost.errors import UserError
from smolpost.talk.conversation import CUT, STOP, Conversation, Frame, Tools
from smolpost.talk.served import ServedSpeaker
from smolpost.talk.settings import Settings
from smolpost.talk.splitter import ANSWER, THINKING
from tests.synthesis.fault_server import start_fault_server

SCHEMA = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


def asked(text="two", **frame):
    conversation = Conversation(Frame(**frame))
    conversation.ask(text)
    return conversation


def reply(speaker, conversation, wanted=None, settings=Settings(), seed=3):  # noqa: B008
    pieces = []
    said = speaker.reply(conversation, settings, wanted, seed, lambda kind, text, heard: pieces.append((kind, text)))
    return said, ["".join(text for k, text in pieces if k == kind) for kind in (THINKING, ANSWER)], len(pieces)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with start_fault_server(tmp_path_factory.mktemp("server"), models=("org/teacher",)) as running:
        yield running


@pytest.fixture
def speaker(server):
    return ServedSpeaker(server.url, None, None, None)


def test_the_only_model_is_asked_and_what_it_is_is_found_out(speaker, server):
    assert (speaker.model, speaker.name, speaker.server, speaker.context) == ("org/teacher", "teacher", "vllm", 131072)
    assert speaker.about == f"teacher: org/teacher on {server.url} (vLLM), context 131,072 tokens"
    settings = Settings(0.3, 0.8, 7, 99)
    said, shown, num_pieces = reply(speaker, asked(system="Be brief."), False, settings)
    assert (said.answer, said.reasoning, said.mode, said.finish) == ("answer to two", "", False, STOP)
    assert shown == ["", "answer to two"] and num_pieces == 3 and said.num_tokens == 3
    body = server.requests()[-1]["body"]
    assert body.pop("messages") == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]
    assert body == {
        "model": "org/teacher", "temperature": 0.3, "top_p": 0.8, "top_k": 7, "max_tokens": 99, "seed": 3,
        "chat_template_kwargs": {"enable_thinking": False}, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "inline"])
def test_thinking_is_read_under_every_name(tmp_path, field):
    with start_fault_server(tmp_path, reasoning=field) as server:
        said, shown, _ = reply(ServedSpeaker(server.url, None, None, None), asked())
    assert said.message == {
        "role": "assistant", "content": "<think>\nreasoning about two, seed 3\n</think>\n\nanswer to two",
    }  # fmt: skip
    assert (said.reasoning, said.answer, said.mode) == ("reasoning about two, seed 3", "answer to two", True)
    assert [text.strip("\n") for text in shown] == ["reasoning about two, seed 3", "answer to two"]
    assert said.num_tokens == 8 and 5 <= said.thinking_tokens <= 7


def test_calls_come_in_pieces_and_their_results_go_back(speaker, server):
    conversation = asked("<<tool>> two", tools=Tools(schemas=(SCHEMA,)))
    said, _, _ = reply(speaker, conversation, False)
    [call] = said.message["tool_calls"]
    assert call["function"] == {"name": "look_up", "arguments": '{"words": "two"}'} and said.whole
    conversation.answer(said, [("look_up", call["id"])])
    conversation.give_result("four")
    reply(speaker, conversation, False)
    body = server.requests()[-1]["body"]
    assert body["tools"] == [SCHEMA] and body["messages"][-1] == {
        "role": "tool", "content": "four", "tool_call_id": "call_1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("500", "refuses .*injected 500"),
        ("429", "refuses .*it is busy: /retry asks again"),
        ("drop", "the reply broke off after .* tokens .* and is not kept; /retry asks again"),
        ("reset", "does not answer"),
        ("error", "sent 'upstream failed' instead of a reply; /retry asks again"),
        ("html", "sent '<html><body>Please sign in to the network.*' instead of a reply"),
        ("garbage", "sent .* instead of a reply"),
        ("empty", "sent '{}' instead of a reply"),
        ("no_reason", "no finish_reason came"),
    ],
)
def test_faults_are_a_line(speaker, action, expected):
    with pytest.raises(UserError, match=expected) as error:
        reply(speaker, asked(f"<<{action}>> {action}"))
    assert "\n" not in str(error.value)


def test_a_reply_that_was_cut_says_so(speaker):
    said, _, _ = reply(speaker, asked("<<cut>> two"), True)
    assert said.finish == CUT and said.answer == "" and not said.whole
    assert said.message["content"] == "<think>\nreasoning about two, seed 3"
    assert said.note == "cut at 8,192 tokens; /set max_new_tokens=16384 and /retry allow more"


def test_what_is_not_there_is_refused_in_one_line(server, tmp_path, monkeypatch):
    def refused(expected, url=server.url, model=None, kind=None, key=None):
        with pytest.raises(UserError, match=expected) as error:
            ServedSpeaker(url, model, kind, key)
        assert "\n" not in str(error.value)

    refused(r"--model other is not served by .*; name one of: org/teacher", model="other")
    refused(r"lists no models \(404: Not Found\); give the address of the API with its version", url=server.url[:-3])
    refused("does not answer .* start the server", url="http://127.0.0.1:9/v1")
    refused(r"api_key_env=NO_SUCH is not set in the environment; export NO_SUCH=", key="NO_SUCH")
    refused(r"is not the address of a server", url="http://host:port/v1")
    with start_fault_server(tmp_path, models=("a", "b"), key="secret") as other:
        refused(r"wants a key \(401: .*\); name its variable with --api-key-env NAME", url=other.url)
        monkeypatch.setenv("MY_KEY", "secret")
        refused(r"serves a, b; choose a model with --model NAME", url=other.url, key="MY_KEY")
        said, _, _ = reply(ServedSpeaker(other.url, "b", None, "MY_KEY"), asked(), False)
        assert said.answer == "answer to two"


@pytest.mark.parametrize("kind", ["sglang", "llama_cpp", "transformers"])
def test_other_servers_are_known_by_their_pages(tmp_path, kind):
    with start_fault_server(tmp_path, kind=kind) as server:
        speaker = ServedSpeaker(server.url, "teacher", None, None)
        assert speaker.server == kind
        reply(speaker, asked(), False)
        body = server.requests()[-1]["body"]
    assert ("stream_options" in body) is (kind != "transformers")
    assert ("generation_config" in body) is (kind == "transformers")


def test_a_hosted_api_gets_no_thoughts_and_no_settings_that_it_refuses(tmp_path):
    with start_fault_server(tmp_path, kind="hosted") as server:
        speaker = ServedSpeaker(server.url, None, "hosted", None)
        conversation = asked("one")
        conversation.answer(reply(speaker, conversation, True)[0], [])
        conversation.ask("two")
        reply(speaker, conversation, False)
        body = server.requests()[-1]["body"]
        assert [m["content"] for m in body["messages"]] == ["one", "answer to one", "two"]
        assert body["reasoning_effort"] == "none"
        with pytest.raises(UserError, match=r"top_k=5 is not a setting of a hosted API"):
            reply(speaker, conversation, settings=Settings(top_k=5))
