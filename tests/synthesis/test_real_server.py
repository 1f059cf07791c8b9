"""A real server: a tiny model that thinks, behind `transformers serve` on loopback."""

import json
import urllib.request

import pytest

from tests.synthesis.thinking_model import NUMBERS, answer, question, reasoning, served

pytestmark = pytest.mark.slow  # training the models takes half a minute


def ask(server, number: int, **settings) -> dict:
    body = {"model": str(server.model), "messages": [{"role": "user", "content": question(number)}], **settings}
    request = urllib.request.Request(
        server.url + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["message"]


def test_the_strong_model_is_right_and_the_weak_one_often_wrong(thinking_models):
    right = []
    for model in thinking_models:
        with served(model) as server:
            replies = [ask(server, number, max_tokens=40)["content"] for number in NUMBERS[:40]]
        right.append(sum(reply == answer(n) for reply, n in zip(replies, NUMBERS, strict=False)))
    assert right[0] >= 36 and right[1] <= 30, right


def test_it_thinks_as_it_is_asked_and_comes_back_on_its_port(thinking_models):
    with served(thinking_models[0]) as server:
        assert ask(server, 47, max_tokens=40)["reasoning_content"] == reasoning(47)
        silent = ask(server, 47, max_tokens=40, chat_template_kwargs={"enable_thinking": False})
        assert "reasoning_content" not in silent and silent["content"] == answer(47)
        server.kill()
        with pytest.raises(OSError):
            ask(server, 47)
        server.start()
        assert ask(server, 47, max_tokens=40)["content"] == answer(47)
