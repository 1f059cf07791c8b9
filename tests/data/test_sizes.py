"""Rows too large or too deep are refused one by one, in every format; what is merely long is not."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode
from smolpost.chat.render import load_template
from smolpost.data.rows import MAX_DEPTH
from smolpost.data.sources import read_rows, read_slice, slices
from smolpost.errors import UserError
from smolpost.schema import Mixture, Source
from smolpost.stages.sft import SFTStage
from tests.families import byte_level
from tests.prepared import prepared
from tests.reading import read

TEXTS = ["one", "x" * 300, "three"]
USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "yo"}
NO_THINK = {"chat_template_kwargs": {"enable_thinking": False}}


def jsonl(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def compressed(folder, rows):
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(folder, rows).read_bytes()))
    return path


def json_list(folder, rows):
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    return folder / "rows.json"


def compressed_list(folder, rows):
    path = folder / "rows.json.gz"
    path.write_bytes(gzip.compress(json_list(folder, rows).read_bytes()))
    return path


def parquet(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def saved(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def json_column(folder, rows):
    columns = {
        name: pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array([json.dumps(row[name]) for row in rows]))
        for name in rows[0]
    }
    pq.write_table(pa.table(columns), folder / "json.parquet")
    return folder / "json.parquet"


FORMATS = [jsonl, compressed, json_list, compressed_list, parquet, saved]


def nested(depth: int):
    value = "end"
    for i in range(depth):
        value = [value] if i % 2 else {"k": value}
    return value


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("write", FORMATS)
def test_a_large_row_is_its_own_fault(write, tmp_path):
    path = write(tmp_path, [{"text": text} for text in TEXTS])
    rows = [row for _, row in read_rows(Source(path=str(path), max_row_bytes=100), faults=True)]
    assert [row.get("text") for row in rows] == ["one", None, "three"] and [row.number for row in rows] == [1, 2, 3]
    assert f"{path}:2: has 3" in rows[1].fault
    assert " bytes, above max_row_bytes=100; split the row, check that each row ends" in rows[1].fault
    raised = read_rows(Source(path=str(path), max_row_bytes=500))
    assert [row["text"] for _, row in raised] == TEXTS
    assert [row["text"] for _, row in read_rows(Source(path=str(path), first_row=2, max_row_bytes=100))] == ["three"]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
@pytest.mark.parametrize(
    "write", [lambda path, text: path.write_bytes(text), lambda path, text: path.write_bytes(gzip.compress(text))]
)
def test_a_line_at_the_limit_is_read_and_one_above_is_not(write, end, tmp_path, monkeypatch):
    monkeypatch.setattr("smolpost.data.jsonl.WINDOW_BYTES", 7)
    for extra in (0, 1, 2, 50):
        path = tmp_path / ("rows.jsonl.gz" if "compress" in write.__code__.co_names else "rows.jsonl")
        first = b'{"text": "' + b"x" * (20 + extra) + b'"}'
        write(path, first + (end.encode() + b'{"text": "y"}\n' if end else b""))
        limit = len(first) - extra + (end == "\r\n")
        found = [
            row.fault or row["text"] for _, row in read_rows(Source(path=str(path), max_row_bytes=limit), faults=True)
        ]
        assert (found[0] == "x" * 20) if not extra else "above max_row_bytes" in found[0]
        assert found[1:] == (["y"] if end else [])


def test_a_line_that_begins_with_a_page_of_blanks_is_one_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text(" " * 99 + '{"text": "a"}\n{"text": "b"}\n')
    source = Source(path=str(tmp_path / "rows.jsonl"), max_row_bytes=20)
    [piece] = slices(source, 10)
    assert [bool(row.fault) for row in read_slice(source, piece)] == [True, False]


def test_many_rows_that_are_large_together_are_read(tmp_path):
    path = parquet(tmp_path, [{"text": "x" * 50}] * 100)
    assert len(read(path, max_row_bytes=100)) == 100


def test_large_rows_are_dropped_up_to_max_dropped(tokenizer, tmp_path):
    rows = [{"messages": [USER, REPLY], **NO_THINK}] * 9 + [{"messages": [USER, REPLY | {"content": "a" * 3000}]}]
    stage = {
        "init_from": "x",
        "data": "x",
        "max_seq_len": 512,
        "global_batch_size": 1,
        "num_workers": 1,
        "learning_rate": 1.0,
    }
    _, report = prepared(SFTStage(**stage), rows, tokenizer, tmp_path, settings={"only": {"max_row_bytes": 2000}})
    assert report["totals"]["dropped"] == {"refused": 1} and report["totals"]["rows_kept"] == 9
    line = json.loads((tmp_path / "rows" / "dropped.jsonl").read_text())
    assert line["row"] == 10 and "above max_row_bytes=2,000" in line["detail"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"sources\.only\.max_row_bytes=0 is below 1"):
        prepared(SFTStage(**stage), rows, tokenizer, tmp_path / "none", settings={"only": {"max_row_bytes": 0}})
    assert Mixture(sources={"only": Source()}).sources["only"].max_row_bytes == 8 * 2**20


# ---------------------------------------------------------------- depth


@pytest.mark.parametrize("write", [jsonl, compressed, json_list, compressed_list, json_column])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 100_000])
def test_a_deep_row_is_its_own_fault(write, depth, tmp_path, monkeypatch):
    text = '{"k":[' * (depth // 2) + "[" * (depth % 2) + "]" * (depth % 2) + "]}" * (depth // 2)
    good = {"tools": nested(MAX_DEPTH - 1)}
    monkeypatch.setattr(json, "dumps", lambda value, dumps=json.dumps, **k: dumps(value, **k).replace('"DEEP"', text))
    path = write(tmp_path, [good, {"tools": "DEEP"}, {"tools": 1}])
    rows = [row for _, row in read_rows(Source(path=str(path)), faults=True)]
    assert [dict(row) for row in rows] == [good, {}, {"tools": 1}]
    assert rows[1].fault == (
        f"{path}:2: is nested more than 100 levels deep; flatten it, or write the inner part as text"
    )


def test_deep_columns_are_refused(tmp_path):
    """Arrow has a limit of its own."""
    with pytest.raises(UserError, match=r"rows\.parquet: is not a readable Parquet file \(.* too deeply nested"):
        read(parquet(tmp_path, [{"text": "a", "tools": nested(120)}]))


@pytest.mark.parametrize("depth, kept", [(90, 2), (150, 1), (900, 1), (5000, 1)])
def test_deep_arguments_in_a_text_are_refused_by_row(depth, kept, tokenizer, tmp_path):
    call = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": '{"k":' * depth + "1" + "}" * depth}}],
    }
    rows = [{"messages": [USER, turn], **NO_THINK} for turn in (REPLY, call)]
    stage = SFTStage(
        init_from="x",
        data="x",
        max_seq_len=2**15,
        global_batch_size=1,
        num_workers=1,
        learning_rate=1.0,
        max_dropped=0.5,
    )
    _, report = prepared(stage, rows, tokenizer, tmp_path)
    assert report["totals"]["rows_kept"] == kept


# ---------------------------------------------------------------- merely long or odd


ODD = {
    "two thousand turns": [USER, REPLY] * 1000,
    "a word of a megabyte": [USER, REPLY | {"content": "a" * 10**6}],
    "a megabyte of blanks": [USER, REPLY | {"content": "a" + " " * 10**6 + "b"}],
    "NUL bytes": [USER | {"content": "a\0b"}, REPLY | {"content": "\0yo\0"}],
}


def test_replies_that_take_a_rendering_each_are_bounded():
    tags = ("{%- generation -%}", "{%- endgeneration -%}")
    untagged = load_template("smollm3").replace(tags[0], "").replace(tags[1], "")
    with pytest.raises(
        UserError, match=r"messages have 1,001 replies, above the 1,000 that can be found without {% gen"
    ):
        encode(byte_level(template=untagged), [USER, REPLY] * 1001, today="x")


@pytest.mark.parametrize("case", ODD)
def test_long_and_odd_texts_train_as_they_are(case, tmp_path):
    tokenizer = byte_level()
    found = encode(tokenizer, ODD[case], template_kwargs={"enable_thinking": False}, today="x")
    trained = [i for i, fate in zip(found.input_ids, found.fates, strict=True) if fate == Fate.TRAINED]
    assert tokenizer.decode(trained) == "".join(
        f"{turn['content']}<|im_end|>" for turn in ODD[case] if turn["role"] == "assistant"
    )
