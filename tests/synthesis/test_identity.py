"""What a teacher's server says of itself, and what is said of it."""

import asyncio

import pytest

from smolpost.errors import UserError
from smolpost.synthesis import identity
from smolpost.synthesis.client import ChatEngine
from smolpost.synthesis.connection import Connection
from smolpost.synthesis.identity import server_kind
from smolpost.synthesis.settings import SERVERS
from tests.synthesis.asking import KEY, asked, identify, teacher_of
from tests.synthesis.fault_server import start_fault_server


def test_the_server_says_who_it_is(tmp_path):
    with start_fault_server(tmp_path / "vllm") as server:
        assert identify(teacher_of(server, revision="abc")) == {
            "server": "vllm", "model": "teacher", "revision": "abc", "max_model_len": 131072, "version": "0.11.0",
            "template": None, "modes": ["default"],
        }  # fmt: skip


@pytest.mark.parametrize("kind", SERVERS)
def test_which_server_answers_is_seen_from_its_pages(tmp_path, kind):
    async def ask():
        async with Connection(server.url, None, key=KEY) as connection:
            return await server_kind(connection)

    with start_fault_server(tmp_path, kind=kind) as server:
        assert asyncio.run(ask()) == kind


def test_the_probe_tries_the_modes_that_are_needed(tmp_path):
    async def say(modes):
        async with ChatEngine(teacher_of(server), key=KEY, modes=modes) as engine:
            return (await engine.identity())["modes"]

    with start_fault_server(tmp_path) as server:
        assert asyncio.run(say({True, False})) == ["no_think", "think"]
        assert [line["thinking"] for line in server.requests()] in ([True, False], [False, True])
        assert asyncio.run(say(())) == []
        server.kill()
        server.start(thinking=False)
        with pytest.raises(
            UserError, match=rf"^{KEY}\.model=teacher was asked to think and replied .* without reasoning"
        ):
            asyncio.run(say({True}))
        server.kill()
        server.start(thinking=True)
        with pytest.raises(UserError, match=rf"^{KEY}\.model=teacher was asked not to think and thought "):
            asyncio.run(say({False}))


@pytest.mark.parametrize(
    "kind, version, template",
    [
        ("sglang", "0.5.3", False),
        ("llama_cpp", "b6700-abc", True),
        ("transformers", None, False),
        ("hosted", None, False),
    ],
)
def test_other_servers_say_what_they_know(tmp_path, kind, version, template):
    with start_fault_server(tmp_path, kind=kind) as server:
        found = identify(teacher_of(server, server=kind))
    assert (found["server"], found["version"], bool(found["template"])) == (kind, version, template)


def test_the_only_model_is_taken_and_said(tmp_path, capsys):
    async def ask():
        async with ChatEngine(teacher_of(server, model=None), key=KEY) as engine:
            await engine.identity()
            return await engine.ask(asked("question"))

    with start_fault_server(tmp_path, models=("only",)) as server:
        assert asyncio.run(ask()).content == "answer to question"
    assert capsys.readouterr().out == f"{KEY}.model is not set: {server.url} serves only, which is asked\n"


def test_another_model_several_models_and_no_server_are_refused(tmp_path):
    with start_fault_server(tmp_path, models=("a", "b")) as server:
        with pytest.raises(UserError, match=rf"^{KEY}\.model is not set, and {server.url} serves a, b; name the model"):
            identify(teacher_of(server, model=None))
        with pytest.raises(
            UserError, match=rf"^{KEY}\.model=c is not served by {server.url}, which has a, b; serve it"
        ):
            identify(teacher_of(server, model="c"))
        with pytest.raises(UserError, match=rf"^{KEY}\.model=c is refused by .*; set it to what is served: a, b$"):
            identify(teacher_of(server, model="c", server="hosted"))  # which may take names that it does not list
        with pytest.raises(UserError, match=r"max_new_tokens=131072 leaves no room for a prompt in the 131072 tokens"):
            identify(teacher_of(server, model="a", max_new_tokens=131072))
        bare = server.url.removesuffix("/v1")
        with pytest.raises(UserError, match=rf"^{KEY}\.url={bare} is not the address .*; set it to {server.url}$"):
            identify(teacher_of(server, model="a", url=bare))
        server.kill()
        with pytest.raises(UserError, match=r"does not answer \(Connection refused\); start the server"):
            identify(teacher_of(server, model="a"))
        server.start()


def test_a_server_that_loads_its_model_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(identity, "POLL", 0.05)
    with start_fault_server(tmp_path, loading=3) as server:
        assert identify(teacher_of(server))["model"] == "teacher"
        line = f"{KEY}.url={server.url}/models answered 503: Loading model; waiting for it"
    assert capsys.readouterr().out.splitlines() == [line]
