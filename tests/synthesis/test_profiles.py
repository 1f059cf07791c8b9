"""Request bodies of each server, written by hand, and settings that a server does not take."""

import json

import pytest

from smolpost.errors import Wrong
from smolpost.synthesis.profiles import PROFILES, unsupported
from smolpost.synthesis.records import Request, RequestFailed
from smolpost.synthesis.settings import SERVERS, Teacher

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
QWEN3 = dict(temperature=0.6, top_p=0.95, top_k=20, min_p=0.0, repetition_penalty=1.05, max_new_tokens=100)


def body(server: str, thinking: bool | None = True, *, url: str | None = None, asked=ASKED, seed=5, **more) -> dict:
    teacher = Teacher(server=server, url=url, **{**QWEN3, **more.pop("teacher", {})})
    return PROFILES[server].payload(teacher, Request(asked, thinking, seed, **more))


def test_every_server_has_a_profile():
    assert tuple(PROFILES) == SERVERS


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_servers_that_take_all(server):
    assert body(server, teacher={"presence_penalty": 1.5}) == {
        "messages": ASKED, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "presence_penalty": 1.5,
        "repetition_penalty": 1.05, "max_tokens": 100, "seed": 5, "chat_template_kwargs": {"enable_thinking": True},
    }  # fmt: skip


def test_transformers_samples_by_a_generation_config():
    sent = body("transformers", thinking=False)
    config = json.loads(sent.pop("generation_config"))
    assert config == {"do_sample": True, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.05}
    assert sent == {
        "messages": ASKED, "temperature": 0.6, "top_p": 0.95, "max_tokens": 100, "seed": 5,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    greedy = body("transformers", teacher={"temperature": 0.0, "top_k": None, "min_p": None})
    assert json.loads(greedy["generation_config"]) == {"do_sample": False, "repetition_penalty": 1.05}


def test_llama_cpp_has_another_name_and_smaller_seeds():
    sent = body("llama_cpp", seed=2**63 - 1)
    assert sent["repeat_penalty"] == 1.05 and sent["repeat_last_n"] == -1 and "repetition_penalty" not in sent
    assert 0 <= sent["seed"] < 2**32 - 1  # 2^32 - 1 stands for a random seed there
    assert "repeat_last_n" not in body("llama_cpp", teacher={"repetition_penalty": None})


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://api.openai.com/v1", "max_completion_tokens"),
        ("https://mine.openai.azure.com/openai/v1", "max_completion_tokens"),
        ("https://api.example.com/v1", "max_tokens"),
    ],
)
def test_hosted(url, name):
    plain = dict(top_k=None, min_p=None, repetition_penalty=None)
    common = {"messages": ASKED, "temperature": 0.6, "top_p": 0.95, "seed": 5, name: 100}
    assert body("hosted", url=url, teacher=plain) == common | {"reasoning_effort": "medium"}
    assert body("hosted", False, url=url, teacher=plain) == common | {"reasoning_effort": "none"}
    assert body("hosted", None, url=url, teacher=plain) == common


def test_a_mode_that_is_left_to_the_template_sends_nothing():
    assert all("chat_template_kwargs" not in body(server, None) for server in SERVERS)


@pytest.mark.parametrize("server", SERVERS)
def test_words_switch_thinking_after_the_last_question(server):
    turns = [*ASKED, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3 + 3?"}]
    sent = body(server, False, asked=turns, teacher={"thinking_by": "words"})
    assert sent["messages"] == [*turns[:3], {"role": "user", "content": "And 3 + 3? /no_think"}]
    assert turns[3]["content"] == "And 3 + 3?"  # the row's own text stays
    assert "chat_template_kwargs" not in sent and "reasoning_effort" not in sent
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]
    sent = body(server, True, asked=parts, teacher={"thinking_by": "words"})
    assert sent["messages"][0]["content"] == [{"type": "text", "text": "Hi."}, {"type": "text", "text": "/think"}]


def test_tools_variables_and_a_length_of_its_own():
    tools = [{"type": "function", "function": {"name": "add"}}]
    variables = {"custom_instructions": "Be kind.", "xml_tools": None}
    sent = body("vllm", True, tools=tools, template_kwargs=variables, max_new_tokens=7)
    assert sent["tools"] == tools and sent["max_tokens"] == 7
    assert sent["chat_template_kwargs"] == {"custom_instructions": "Be kind.", "enable_thinking": True}
    assert "tools" not in body("vllm", tools=[])  # vLLM answers 400 to an empty list
    assert body("hosted", template_kwargs={"custom_instructions": ""})
    with pytest.raises(RequestFailed, match=r"lets no variable .* the row sets custom_instructions"):
        body("hosted", template_kwargs=variables)


@pytest.mark.parametrize(
    ("server", "setting", "line"),
    [
        (
            "hosted", {"top_k": 20},
            "stages.t.teacher.top_k=20 is not a setting of a hosted API (server=hosted); set it to null, or ask a "
            "server that takes it: vllm, sglang, transformers, llama_cpp",
        ),
        (
            "transformers", {"presence_penalty": 0.5},
            "stages.t.teacher.presence_penalty=0.5 is not a setting of transformers serve (server=transformers); set "
            "it to null, or ask a server that takes it: vllm, sglang, llama_cpp, hosted",
        ),
    ],
)  # fmt: skip
def test_a_setting_that_the_server_does_not_take_is_refused(server, setting, line):
    [fault] = unsupported(Teacher(server=server, **setting), "stages.t.teacher")
    assert isinstance(fault, Wrong) and str(fault) == line and fault.key.endswith(next(iter(setting)))


def test_no_setting_is_dropped():
    """What the recipe sets is in the body, or it is refused."""
    values = {"top_k": 11, "min_p": 0.125, "presence_penalty": 0.75, "repetition_penalty": 1.25}
    for server in SERVERS:
        refused = {fault.key.rpartition(".")[2] for fault in unsupported(Teacher(server=server, **values), "t")}
        sent = json.dumps(body(server, teacher=values))
        assert {name for name, value in values.items() if str(value) not in sent} == refused, server
