"""The question before a run, answered by scripted teachers."""

import asyncio

import pytest

from smolpost.errors import UserError
from smolpost.synthesis.probe import MAX_NEW_TOKENS, probe
from smolpost.synthesis.records import Reply, RequestFailed
from smolpost.synthesis.settings import Teacher

THOUGHT, PLAIN = Reply("12", "7 and 5.", "stop"), Reply("12", None, "stop")
CUT = Reply("", "7 and", "length", closed=False)
EMPTY_BLOCK = Reply("12", "", "stop")


def run(replies: dict, modes, **fields) -> tuple[list[str], list]:
    """What the probe finds, and the requests that it made."""
    asked = []

    async def ask(request):
        asked.append(request)
        if isinstance(found := replies[request.thinking], Exception):
            raise found
        return found

    teacher = Teacher(model="Qwen/Qwen3-32B", **fields)
    return asyncio.run(probe(ask, teacher, modes, key="stages.t.teacher")), asked


def test_only_the_modes_that_are_needed_are_asked():
    replies = {True: THOUGHT, False: PLAIN, None: THOUGHT}
    found, asked = run(replies, [True])
    assert found == ["think"] and [request.thinking for request in asked] == [True]
    assert asked[0].max_new_tokens == MAX_NEW_TOKENS
    found, asked = run(replies, [True, False, True, None], max_new_tokens=40)
    assert found == ["default", "no_think", "think"] and len(asked) == 3
    assert asked[0].max_new_tokens == 40


@pytest.mark.parametrize("reply", [THOUGHT, CUT])
def test_a_cut_think_block_shows_that_it_thinks(reply):
    assert run({True: reply}, [True])[0] == ["think"]


@pytest.mark.parametrize("reply", [PLAIN, EMPTY_BLOCK])
def test_an_empty_block_is_no_thinking(reply):
    assert run({False: reply}, [False])[0] == ["no_think"]
    with pytest.raises(UserError, match="was asked to think and replied '12' without reasoning; its chat template may"):
        run({True: reply}, [True])


@pytest.mark.parametrize(
    ("replies", "fields", "line"),
    [
        ({True: PLAIN}, {"server": "hosted"}, "the API may hide reasoning: choose one that gives it, set stages.t."),
        ({True: PLAIN}, {"server": "llama_cpp"}, "start llama-server with --jinja"),
        ({True: PLAIN}, {"thinking_by": "words"}, "set stages.t.teacher.thinking_by=server, or choose a model that"),
        ({False: THOUGHT}, {}, "was asked not to think and thought '7 and 5.'; choose a model that can answer without"),
        ({False: Reply("", "12", "stop")}, {}, "its whole reply came as reasoning; start the server with the model's"),
        ({None: Reply("", None, "stop")}, {}, "gave an empty reply to 'What is 7"),
        (
            {None: RequestFailed("422: Unexpected fields in the request: {'top_k'}")},
            {"server": "vllm"},
            "stages.t.teacher: vLLM (server=vllm) refuses a plain question: 422: Unexpected fields in the request: "
            "{'top_k'}; set stages.t.teacher.server and stages.t.teacher.model to what answers there",
        ),
    ],
)
def test_each_fault_is_one_line(replies, fields, line):
    with pytest.raises(UserError) as caught:
        run(replies, list(replies), **fields)
    text = str(caught.value)
    assert line in text and "\n" not in text and text.startswith("stages.t.teacher")
