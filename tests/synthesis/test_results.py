"""The files of a stage of synthetic data: nothing is lost between outcomes and what training reads."""

import json
import re

import datasets
import pyarrow.parquet as pq
import pytest
import yaml

from smolpost.chat.render import load_template, render
from smolpost.data.mixtures import take
from smolpost.data.prompts import mode_of
from smolpost.errors import UserError
from smolpost.schema import Source
from smolpost.synthesis import results, row_table
from smolpost.synthesis.records import Verdict
from tests.synthesis.outcomes import FACTS, THOUGHT, accepted, failed, filtered, pair, record, turns

ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
TOOL = {"type": "function", "function": ADD}


def written(folder, outcomes, max_failed=0.0, **expected):
    outcomes = list(outcomes)
    return results.write(
        folder, iter(outcomes), facts=FACTS, max_failed=max_failed, **{"num_prompts": len(outcomes)} | expected
    )


def read_back(file) -> list[dict]:
    """As a training stage reads them."""
    return take(Source(path=str(file)), "generated", 0)


def shown(row: dict, side: str = "messages") -> str:
    return render(
        load_template("smollm3"), row[side], template_kwargs=row.get("chat_template_kwargs"), tools=row.get("tools"),
        today="1 July 2025",
    )  # fmt: skip


def test_rows_render_as_the_job_made_them(tmp_path):
    called = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    as_object = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "unit": "k"}}}
    tool_turns = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "<think>\nCall.\n</think>\n\n", "tool_calls": [called]},
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "", "tool_calls": [as_object]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Done ✓", "train": False},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "<think>\nBye.\n</think>\n\nBye.", "reasoning_content": None},
    ]
    outcomes = [
        accepted("think", chat_template_kwargs=None),  # the key that other rows have is missing here
        accepted("no-think", answer="4", chat_template_kwargs={"enable_thinking": False, "python_tools": []}),
        accepted("none", chat_template_kwargs={"enable_thinking": None, "custom_instructions": "Be brief."}),
        accepted("by-word", messages=[{"role": "system", "content": "/no_think Hi"}, *turns("2 + 2?", "4")],
                 chat_template_kwargs={}),
        accepted("tools", messages=tool_turns, tools=[TOOL], chat_template_kwargs=None),
        accepted("xml", chat_template_kwargs={"xml_tools": [TOOL, json.dumps(ADD)]}),
    ]  # fmt: skip
    written(tmp_path, outcomes)
    rows = read_back(tmp_path / results.ROWS)
    assert [row["id"] for row in rows] == ["think", "no-think", "none", "by-word", "tools", "xml"]
    assert [mode_of(row) for row in rows] == ["think", "no_think", "think", "no_think", "think", "think"]
    assert [shown(row) for row in rows] == [shown(outcome.row) for outcome in outcomes]
    calls = [turn["tool_calls"][0]["function"] for turn in rows[4]["messages"] if "tool_calls" in turn]
    assert [json.loads(call["arguments"]) for call in calls] == [{"a": 1, "b": None}, {"a": 2, "unit": "k"}]
    assert rows[4]["messages"][5]["train"] is False and "train" not in rows[4]["messages"][7]
    assert rows[4]["tools"] == [TOOL]


def test_pairs_render_as_the_job_made_them(tmp_path):
    outcomes = [pair("a"), pair("b", sides=("4", "<think>\n</think>\n\n5"), chat_template_kwargs={})]
    written(tmp_path, outcomes)
    rows = read_back(tmp_path / results.ROWS)
    for row, outcome in zip(rows, outcomes, strict=True):
        assert row["prompt"] == outcome.row["prompt"] and row["source"] == "maths_pairs"
        assert [shown(row, side) for side in ("chosen", "rejected")] == [
            shown(outcome.row, side) for side in ("chosen", "rejected")
        ]


def test_columns_do_not_depend_on_the_rows(tmp_path):
    for name, outcomes in {
        "plain": [accepted("a")],
        "pairs": [pair("a")],
        "more": [accepted("a", tools=[TOOL])],
    }.items():
        (tmp_path / name).mkdir()
        written(tmp_path / name, outcomes)
    schemas = {name: pq.read_schema(tmp_path / name / results.ROWS) for name in ("plain", "pairs", "more")}
    assert schemas["plain"].equals(schemas["more"])
    assert schemas["plain"].names == ["id", "messages", "chat_template_kwargs", "tools", "source"]
    assert schemas["pairs"].names == ["id", "prompt", "chosen", "rejected", "chat_template_kwargs", "tools", "source"]
    kwargs = schemas["plain"].field("chat_template_kwargs").type
    assert {kwargs.field(i).name for i in range(kwargs.num_fields)} == {
        "custom_instructions", "enable_thinking", "python_tools", "xml_tools",
    }  # fmt: skip


def test_counts_add_up(tmp_path):
    outcomes = [
        accepted("1"), accepted("2", source="code"), filtered("3"), filtered("4", "cut", "code"),
        filtered("5", "wrong"), failed("6"), failed("7", "HTTP 400: too long", "code"), failed("8"),
    ]  # fmt: skip
    report = written(tmp_path, outcomes, max_failed=0.5)
    assert report == json.loads((tmp_path / results.REPORT).read_text())
    assert (report["prompts"], report["accepted"], report["failed"]) == (8, 2, 3)
    assert report["filtered"] == {"cut": 2, "wrong": 1}
    assert report["errors"] == {"HTTP 500": 2, "HTTP 400: too long": 1}
    assert report["sources"]["code"] == {"prompts": 3, "accepted": 1, "filtered": {"cut": 1}, "failed": 1}
    assert report["teachers"]["teacher"] == {"replies": 5, "cut": 3, "prompt_tokens": 50, "completion_tokens": 25}
    for entry in (report, *report["sources"].values()):
        assert entry["accepted"] + sum(entry["filtered"].values()) + entry["failed"] == entry["prompts"]

    lines = [json.loads(line) for line in (tmp_path / results.FILTERED_ROWS).read_text().splitlines()]
    assert [(line["id"], line["reason"], line["scores"]) for line in lines] == [
        ("3", "cut", {"repetition": 0.5}), ("4", "cut", {"repetition": 0.5}), ("5", "wrong", {"repetition": 0.5}),
    ]  # fmt: skip
    assert lines[0]["samples"] == {"teacher": [turns("2 + 2?", "<think>\nOn and")]}
    lines = [json.loads(line) for line in (tmp_path / results.FAILED_ROWS).read_text().splitlines()]
    assert lines[1] == {
        "id": "7", "source": "code", "error": "HTTP 400: too long", "attempts": {"teacher": ["500", "500"]},
        "row": {"messages": [{"role": "user", "content": "2 + 2?"}]},
    }  # fmt: skip


def test_provenance_names_teacher_reply_and_verdicts(tmp_path):
    half = '"\ud83d"'  # of a surrogate pair: what a server's JSON can hold and a text cannot
    odd = accepted("odd")
    odd = odd._replace(records={"teacher": record("odd", "maths", turns("?", "4"), raw={"content": half})})
    written(tmp_path, [accepted("1"), filtered("2"), failed("3"), odd], max_failed=1)
    found = pq.read_table(tmp_path / results.PROVENANCE_ROWS).to_pylist()
    assert [(row["id"], row["status"], row["reason"], row["error"]) for row in found] == [
        ("1", "accepted", None, None), ("2", "filtered", "cut", None), ("3", "failed", None, "HTTP 500"),
        ("odd", "accepted", None, None),
    ]  # fmt: skip
    assert found[0]["row_hash"] == found[1]["row_hash"] and len(found[0]["row_hash"]) == 64
    assert found[0]["verdicts"] == [
        {"filter": "finished", "passed": True, "reason": "", "score": None},
        {"filter": "repetition", "passed": True, "reason": "", "score": 0.25},
    ]
    [reply] = found[0]["replies"]
    assert json.loads(reply.pop("raw")) == {"content": THOUGHT}
    assert json.loads(reply.pop("sampling")) == {"temperature": 0.6, "top_k": 20}
    assert reply == {
        "role": "teacher", "sample": 0, "turn": 0, "model": "Qwen/Qwen3-32B", "revision": "abc", "server": "vllm",
        "server_version": "0.32.0", "template_hash": "0123", "seed": 7, "finish_reason": "stop", "prompt_tokens": 10,
        "completion_tokens": 5, "attempts": 1, "seconds": 0.0,
    }  # fmt: skip
    assert json.loads(found[3]["replies"][0]["raw"]) == {"content": half}
    assert found[2]["replies"] == []


def test_a_row_that_is_not_unicode_is_filtered(tmp_path):
    report = written(tmp_path, [accepted("1"), accepted("2", answer="\ud83d")])
    assert report["filtered"] == {"not_text": 1} and report["accepted"] == 1
    assert [row["id"] for row in read_back(tmp_path / results.ROWS)] == ["1"]


def test_row_groups_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(row_table, "BATCH_ROWS", 8)
    monkeypatch.setattr(row_table, "GROUP_BYTES", 20_000)
    written(tmp_path, (accepted(str(i), answer=f"{i}" * 1000) for i in range(50)))
    metadata = pq.read_metadata(tmp_path / results.ROWS)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sum(sizes) == 50 and len(sizes) > 2 and max(sizes) <= 24
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert [row["id"] for row in read_back(tmp_path / results.ROWS)] == [str(i) for i in range(50)]


def test_the_card_says_how_to_load_it(tmp_path):
    written(tmp_path, [accepted("1", source="a|b <i>\nc"), filtered("2")])
    text = (tmp_path / results.CARD).read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert {entry["config_name"]: entry["data_files"] for entry in header["configs"]} == {
        "default": "rows.parquet", "provenance": "provenance.parquet",
    }  # fmt: skip
    assert "| a\\|b &lt;i> c | 1 | 1 | 0 | 0 | 100.0% |" in text and "| all | 2 | 1 | 1 | 0 | 50.0% |" in text
    assert "| temperature | 0.6 |" in text and "licence" in text
    rows = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(rows["id"]) == ["1"]
    assert rows[0]["chat_template_kwargs"]["enable_thinking"] is True


@pytest.mark.parametrize(
    ("outcomes", "settings", "text"),
    [
        ([accepted("1"), failed("2"), failed("3", "HTTP 400"), failed("4")], {"max_failed": 0.5},
         "stages.traces: 3 of 4 prompts have failed, more than max_failed=0.5 allows; the commonest error, 2 times: "
         "HTTP 500; stages.traces.retry_failed=true asks exactly these again, stages.traces.max_failed=0.75 accepts "
         "them"),
        ([accepted("1")], {"num_prompts": 2}, "stages.traces: the job gave 1 outcomes for 2 prompts; "),
        ([filtered("1"), filtered("2", "cut"), filtered("3", "wrong")], {},
         "stages.traces: none of 3 prompts became a row (2 cut, 1 wrong); raise the teacher's max_new"),
        ([filtered("1", "chosen_too_long")], {}, "(1 chosen_too_long); raise filters.max_tokens"),
        ([filtered("1", "mine")], {}, "(1 mine); loosen the filter that says mine"),
        ([failed("1")], {"max_failed": 1.0}, "(1 failed); the commonest error: HTTP 500"),
        ([], {}, "stages.traces: no row can be made from 0 prompts"),
        ([accepted("1")._replace(reason="cut")], {}, "prompt 1 became row and reason; "),
        ([filtered("1")._replace(reason="")], {}, "prompt 1 became nothing; "),
        ([accepted("1", chat_template_kwargs={"a": 1})], {}, "chat_template_kwargs.a of prompt 1 has no column"),
    ],
)  # fmt: skip
def test_what_is_not_finished(tmp_path, outcomes, settings, text):
    with pytest.raises(UserError, match=re.escape(text)) as error:
        written(tmp_path, outcomes, **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / results.REPORT).exists() and not (tmp_path / results.CARD).exists()


def test_max_failed_that_is_named_is_enough(tmp_path):
    outcomes = [accepted("0"), *(failed(str(i)) for i in range(1, 3))]  # 2 of 3: 0.667 when rounded up
    with pytest.raises(UserError) as error:
        written(tmp_path, outcomes)
    share = float(re.search(r"max_failed=([\d.]+) accepts", str(error.value))[1])
    assert written(tmp_path, outcomes, max_failed=share)["failed"] == 2


def test_scores_may_be_whole_numbers(tmp_path):
    written(tmp_path, [accepted("1")._replace(verdicts={"length": Verdict(True, score=12)})])
    assert pq.read_table(tmp_path / results.PROVENANCE_ROWS)["verdicts"][0].as_py()[0]["score"] == 12.0
