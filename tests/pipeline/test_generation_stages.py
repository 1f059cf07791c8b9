"""Stages that ask teachers: what decides their replies and their rows, and what each command does."""

import json
import re

import pytest

from smolpost import cli, recipe
from smolpost.errors import UserError
from smolpost.pipeline import steps
from smolpost.pipeline.run import status
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


def test_of_a_nested_setting_the_plan_says_what_changed(traces):
    name = traces.make().name
    reason = status(traces.located("stages.made.teacher.temperature=0.9")[1])
    assert reason == ("run", f"changed: teacher.temperature 0.6 -> 0.9 ({name} is kept)")


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


def test_failed_prompts_alone_are_asked_again_and_the_status_says_what_there_is(tmp_path, monkeypatch):
    def reply(request):
        return RequestFailed("the server said 400", ("400",)) if is_down else thinking_reply(request)

    def status(*words):
        return json.loads((made.located(*words)[1].replies["teacher"].folder / "status.json").read_text())

    is_down = True
    made = Generated(tmp_path, monkeypatch, "reasoning_traces", sums(3), TEACHER, teacher=reply)
    with pytest.raises(
        UserError, match=r"3 of 3 prompts have failed.*stages.made.retry_failed=true asks exactly these"
    ):
        made.make()
    assert (status()["done"], status()["failed"]) == (0, 3)
    is_down = False
    made.make("stages.made.retry_failed=true")
    assert len(made.asked()) == 6 and (status()["done"], status()["failed"]) == (3, 0)
    made.make("stages.made.filters.max_tokens=99")
    assert len(made.asked()) == 6 and (status()["done"], status()["failed"]) == (3, 0)
    stage = made.located()[1]
    assert "3 of 3 prompts are finished" in stage.config.reply_notes(stage.replies)[0]


def test_rows_without_a_reply_are_prompts_and_others_are_refused_by_their_place(tmp_path, monkeypatch):
    rows = [{"prompt": "1+1?"}, {"messages": [{"role": "user", "content": "2+2?"}]}]
    made = Generated(tmp_path, monkeypatch, "reasoning_traces", rows, TEACHER, teacher=thinking_reply)
    assert [row["messages"][0]["content"] for row in made.made()[0]] == ["1+1?", "2+2?"]
    made.rows.write_text(json.dumps({"prompt": "1+1?"}) + "\n" + json.dumps({"question": "2+2?"}) + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl:2: has the columns question"):
        made.make()


def test_a_preview_is_spread_over_the_sources_and_keeps_nothing(traces, capsys):
    lineage, stage = traces.located()
    steps.preview(lineage, stage, 3)
    shown = capsys.readouterr().out
    asked = [request.messages[-1]["content"] for request in traces.asked()]
    assert asked == ["0+0?", "1+1?", "2+2?"]  # two of the source with three rows, one of the other
    assert "preview of 3 of 5 prompts: 3 accepted; nothing is kept" in shown and "You said 1+1?" in shown
    assert not stage.folder.exists() and not stage.replies["teacher"].folder.exists()
    steps.preview(lineage, stage, 99)
    assert len(traces.asked()) == 3 + 5


def test_parts_of_the_prompts_are_asked_apart_and_then_made(traces, capsys):
    words = ["stages.made.tasks=2", "stages.made.chunk_size=2"]
    lineage, stage = traces.located(*words)
    steps.generate(lineage, stage, 0)
    first = len(traces.asked())
    assert 0 < first < 5 and not stage.folder.exists()
    assert f"teacher: {first} of 5 prompts are finished" in capsys.readouterr().out
    steps.generate(lineage, stage, 1)
    assert len(traces.asked()) == 5 and "teacher: 5 of 5 prompts are finished" in capsys.readouterr().out
    assert len(traces.made(*words)[0]) == 5 and len(traces.asked()) == 5
    with pytest.raises(UserError, match="task=2 is not one of the 2 tasks"):
        steps.generate(lineage, stage, 2)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["preview=0"], "smolpost: preview=0 is not a number of prompts; give one from 1, such as preview=10"),
        (["preview=ten"], "smolpost: preview=ten is not a number of prompts; give one from 1, such as preview=10"),
        (["task=0"], "smolpost: task=0 goes with `smolpost generate`, without preview; leave it out"),
        (["task=-1"], "smolpost: task=-1 is not the number of a task; give one from 0, such as task=0"),
    ],
)
def test_a_wrong_word_is_one_line(traces, capsys, words, line):
    with pytest.raises(SystemExit) as end:
        cli.main(["make", *traces.words, "stage=made", *words])
    assert end.value.code == 2 and capsys.readouterr().err.strip() == line


@pytest.mark.parametrize("verb", ["make", "generate"])
def test_a_preview_on_the_command_line(traces, verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, *traces.words, "stage=made", "preview=2"])
    assert end.value.code == 0 and "preview of 2 of 5 prompts" in capsys.readouterr().out


def test_stages_without_a_teacher_have_neither_preview_nor_parts(tmp_path, capsys):
    words = ["pipeline=tiny", f"run_dir={tmp_path}", "stage=tasks"]
    for verb, more, message in [
        ("make", ["preview=2"], "of kind tasks asks no teacher, so it has no preview"),
        ("generate", [], "of kind tasks asks no teacher; `smolpost make` makes it"),
    ]:
        with pytest.raises(SystemExit) as end:
            cli.main([verb, *words, *more])
        assert end.value.code == 2 and message in capsys.readouterr().err


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
    assert stage.config.reply_notes(stage.replies)[0].startswith(
        "teacher: big at (no url yet), think, temperature 0.6, top_p 0.95, max_new_tokens 32768; no replies yet"
    )
    with pytest.raises(
        UserError, match=r"stages.made.teacher.url has no value; serve big .*url=http://localhost:8000/v1"
    ):
        traces.make("stages.made.teacher.url=null")
    assert not traces.asked()


def test_what_became_of_the_prompts_is_said_by_source_and_reason(tmp_path, monkeypatch, capsys):
    def reply(request):
        is_cut = request.messages[-1]["content"] == "2+2?"
        return Reply("", "hm", "length", closed=False, completion_tokens=9) if is_cut else thinking_reply(request)

    made = Generated(tmp_path, monkeypatch, "reasoning_traces", sums(5), TEACHER, teacher=reply)
    folder = made.make()
    shown = capsys.readouterr().out.splitlines()
    [doubles] = [line.split() for line in shown if line.startswith("doubles")]
    assert doubles == ["doubles", "3", "2", "66.7%", "1", "0"]
    assert "teacher: mean tokens accepted 5 (4 replies), dropped 9 (1 replies); 20.0% cut" in shown
    assert shown[-1].startswith(f"{folder}: 4 rows; `smolpost inspect {folder}` shows samples")


SWITCH = "stages.made.teacher.thinking"


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("reasoning_traces", [f"{SWITCH}=null", "stages.made.only_missing=prompts"],
         "stages.made.only_missing=prompts needs one mode for all prompts; set stages.made.teacher.thinking to"),
        ("rejection_samples", ["stages.made.teacher.temperature=0"],
         "stages.made.teacher.temperature=0 gives 4 equal replies; raise it, or set stages.made.num_samples=1"),
        ("judge", ["stages.made.filters.language=true"], "stages.made.filters are not read, as a judge"),
        ("mode_switch", [f"{SWITCH}=true"], f"{SWITCH}=true fixes the mode that this stage switches"),
        ("mode_switch", ["stages.made.turns=1"], "stages.made.turns=1 is below 2, its least value"),
        ("everyday_conversations", ["stages.made.min_turns=5"], "stages.made.min_turns=5 is above max_turns=4"),
        ("everyday_conversations", ["+stages.made.languages.nl=1"], "stages.made.languages.nl is not a language"),
        ("everyday_conversations", ["stages.made.languages={en: -1}"], "stages.made.languages.en=-1 is below 0"),
        ("everyday_conversations", ["stages.made.languages={en: 0, fr: 0, es: 0, de: 0, it: 0, pt: 0}"],
         "stages.made.languages has no share above 0; give one"),
        ("everyday_conversations", ["stages.made.filters.answer=keep"], "stages.made.filters.answer=keep needs right"),
        ("everyday_conversations", ["stages.made.personas=lost.txt"], "stages.made.personas=lost.txt is not a file"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(tmp_path, monkeypatch, kind, words, message):
    settings = f"prompts: prompts\n{TEACHER}" if kind == "judge" else TEACHER
    made = Generated(tmp_path, monkeypatch, kind, sums(2), settings)
    assert recipe.load(made.words).recipe.stages["made"].kind == kind
    with pytest.raises(UserError, match=re.escape(message)):
        recipe.load([*made.words, *words])


def test_personas_of_ones_own_are_in_the_key(tmp_path, monkeypatch):
    def reply(request):
        text = request.messages[-1]["content"]
        return Reply("What is a good soup for a cold winter evening?" if "Play a person" in text else "Onion soup.",
                     None, "stop")  # fmt: skip

    settings = (
        "languages: {en: 1, fr: 0, es: 0, de: 0, it: 0, pt: 0}\nnum_conversations: 3\nfilters: {language: false}\n"
    )
    made = Generated(tmp_path, monkeypatch, "everyday_conversations", [], settings + TEACHER, teacher=reply)
    file = tmp_path / "people.txt"
    file.write_text("a diver\n\na diver\na smith\n")
    words = [f"stages.made.personas={file}"]
    rows, report = made.made(*words)
    assert report["accepted"] == 3 and {row["source"] for row in rows} == {"everyday_en"}
    played = {request.messages[0]["content"].split("\n")[1] for request in made.asked() if "Play" in str(request)}
    assert played <= {"The person: a diver.", "The person: a smith."}
    before = made.located(*words)[1]
    file.write_text("a diver\na smith\n")
    assert made.located(*words)[1].key == before.key  # the same people
    file.write_text("a diver\na smith\na monk\n")
    after = made.located(*words)[1]
    assert after.key != before.key and after.replies["teacher"].folder != before.replies["teacher"].folder
    file.write_text("\n")
    with pytest.raises(UserError, match=r"people.txt: has no line; write one for each of the personas"):
        made.located(*words)


def test_pairs_can_be_judged_by_a_later_stage(tmp_path, monkeypatch):
    """Jobs are stages: one reads another's rows."""

    def reply(request):
        text = request.messages[-1]["content"]
        if text.startswith("You compare"):
            first_is_good = text.index("good answer") < text.index("bad answer")
            return Reply("A: 9, B: 2" if first_is_good else "A: 2, B: 9", None, "stop")
        return Reply("good answer", None, "stop")

    made = Generated(
        tmp_path, monkeypatch, "pairs", sums(3),
        "chosen: {stage: null, model: big, url: http://localhost:1/v1}\n"
        "rejected: {stage: null, model: small, url: http://localhost:1/v1}",
        chosen=reply, rejected=lambda request: Reply("bad answer", None, "stop"), teacher=reply,
    )  # fmt: skip
    made.make()
    words = [
        "+schema@stages.judged=judge", "stages.judged.prompts=made", "stages.judged.teacher.model=judge",
        "stages.judged.teacher.url=http://localhost:1/v1", "+data.made.sources.pairs.stage=made",
        "+data.made.sources.pairs.path=rows.parquet",
    ]  # fmt: skip
    lineage = made.located(*words)[0]
    folder = steps.make(lineage, lineage.stages["judged"])
    report = json.loads((folder / "report.json").read_text())
    assert report["accepted"] == 3 and report["filtered"] == {}
