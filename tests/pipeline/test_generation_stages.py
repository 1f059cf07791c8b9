"""Stages that ask teachers: what decides their replies and their rows, and what each command does."""

import json

import pytest

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.synthesis.records import Reply, RequestFailed
from tests.synthesis.fakes import thinking_reply
from tests.synthesis.generated import Generated

TEACHER = "teacher: {model: big, url: http://localhost:1/v1}"
NO_THINK = {"enable_thinking": False}


def sums(number):
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i}+{i}?"},
                {"role": "assistant", "content": f"{2 * i}"},
            ],
            "chat_template_kwargs": NO_THINK,
            "source": "sums" if i % 2 else "doubles",
        }
        for i in range(number)
    ]


@pytest.fixture
def traces(tmp_path, monkeypatch):
    return Generated(tmp_path, monkeypatch, "reasoning_traces", sums(5), TEACHER, teacher=thinking_reply)


def test_each_prompt_becomes_a_row_in_think_mode(traces):
    rows, report = traces.made()
    assert [request.thinking for request in traces.asked()] == [True] * 5
    assert [request.messages for request in traces.asked()][3] == [{"role": "user", "content": "3+3?"}]
    assert len({request.seed for request in traces.asked()}) == 5
    assert len({row["id"] for row in rows}) == 5
    assert rows[3]["messages"] == [
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "<think>\nThey say 3+3?\n</think>\n\nYou said 3+3?"},
    ]
    assert rows[3]["chat_template_kwargs"]["enable_thinking"] is True
    assert [row["source"] for row in rows] == ["doubles_traces", "sums_traces"] * 2 + ["doubles_traces"]
    assert (report["prompts"], report["accepted"], report["filtered"], report["failed"]) == (5, 5, {}, 0)


def test_filters_cost_no_tokens_and_other_sampling_keeps_the_older_replies(traces, capsys):
    first = traces.make()
    assert traces.make() == first and len(traces.asked()) == 5
    assert traces.make("stages.made.filters.min_tokens=2") != first
    assert len(traces.asked()) == 5
    capsys.readouterr()
    traces.make("stages.made.teacher.temperature=0.9")
    assert len(traces.asked()) == 10
    older = traces.located()[1].replies["teacher"].folder
    assert f"asked again; kept: {older.name}" in capsys.readouterr().out


def test_what_is_in_which_key(traces):
    def keys(*words):
        stage = traces.located(*words)[1]
        return stage.key, stage.replies["teacher"].folder.name

    key, replies = keys()
    for harmless in ("url=http://other/v1", "concurrency=3", "input_price=2", "request_timeout=3", "api_key_env=KEY"):
        assert keys(f"stages.made.teacher.{harmless}") == (key, replies)
    for harmless in ("chunk_size=7", "tasks=2", "max_failed=0.5", "retry_failed=true"):
        assert keys(f"stages.made.{harmless}") == (key, replies)
    assert keys("stages.made.filters.max_tokens=99")[0] != key
    assert keys("stages.made.filters.max_tokens=99")[1] == replies
    assert keys("stages.made.suffix=_long")[1] == replies
    for asked in ("teacher.top_k=3", "teacher.model=other", "teacher.max_new_tokens=9", "seed=1", "turns=every"):
        assert keys(f"stages.made.{asked}")[1] != replies, asked
    traces.rows.write_text(traces.rows.read_text() + json.dumps(sums(1)[0]) + "\n")
    assert keys()[1] != replies


def test_a_failed_prompt_is_counted_and_a_cut_reply_is_filtered(tmp_path, monkeypatch):
    def reply(request):
        text = request.messages[-1]["content"]
        if text == "1+1?":
            return RequestFailed("the server said 400", ("400",))
        return Reply("", "hm", "length", closed=False) if text == "2+2?" else thinking_reply(request)

    made = Generated(tmp_path, monkeypatch, "reasoning_traces", sums(5), TEACHER, teacher=reply)
    rows, report = made.made("stages.made.max_failed=0.2")
    assert [row["source"] for row in rows] == ["doubles_traces", "sums_traces", "doubles_traces"]
    assert report["failed"] == 1 and sum(report["filtered"].values()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stages.made.teacher.model=null"], "stages.made.teacher names no model; choose a file of recipes/teacher"),
        (["stages.made.teacher.stage=checkpoint"], "stages.made.teacher.model=big belongs to a server"),
        (["stages.made.prompts=lost"], "stages.made.prompts=lost is not a mixture under data"),
        (["stages.made.teacher.stage=lost", "stages.made.teacher.model=null", "stages.made.teacher.url=null"],
         "stages.made.teacher.stage=lost is not a stage of this pipeline"),
    ],
)  # fmt: skip
def test_a_teacher_that_cannot_be_meant_is_refused(traces, words, message):
    with pytest.raises(UserError, match=message):
        recipe.load([*traces.words, *words])


def test_a_server_without_an_address_plans_and_is_refused_when_it_is_asked(traces):
    stage = traces.located("stages.made.teacher.url=null")[1]
    assert stage.config.reply_notes(stage.replies)[0].startswith("teacher: big at (no url yet); no replies yet")
    with pytest.raises(
        UserError, match=r"stages.made.teacher.url has no value; serve big .*url=http://localhost:8000/v1"
    ):
        traces.make("stages.made.teacher.url=null")
    assert not traces.asked()
