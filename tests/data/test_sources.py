import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolpost.data.sources import fingerprint, read_rows, validate_row
from smolpost.errors import UserError
from smolpost.schema import Source

USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CHAT = {"messages": [USER, REPLY]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
ROWS = [{"text": "one"}, {"text": "two", "extra": 2}, {"text": "three"}]


def read(path, **settings):
    return list(read_rows(Source(path=str(path), **settings)))


def test_jsonl_rows_keep_their_own_keys_and_line_numbers(write_jsonl):
    path = write_jsonl([ROWS[0], "", ROWS[1], {"text": "four", "none": None}])
    assert read(path) == [(1, ROWS[0]), (3, ROWS[1]), (4, {"text": "four", "none": None})]
    assert read(path)[1][1].where == f"{path}:3"


def test_gzipped_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n'))
    assert read(path) == [(1, ROWS[0])]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"rows.jsonl.gz: is no whole gzip file .* compress it again"):
        read(path)


@pytest.mark.parametrize(
    "first, most, kept", [(0, None, [1, 2, 3]), (1, None, [2, 3]), (0, 2, [1, 2]), (1, 1, [2]), (2, 9, [3])]
)
def test_first_row_and_max_rows(write_jsonl, first, most, kept):
    assert [number for number, _ in read(write_jsonl(ROWS), first_row=first, max_rows=most)] == kept


def none_filled():
    """Two rows whose keys Arrow unifies: each lacks what the other has."""
    other = {**CHAT, "chat_template_kwargs": {"custom_instructions": "Be kind."}}
    first = {"messages": [USER, CALL], "chat_template_kwargs": {"enable_thinking": False}}
    return [first, other]


def expected_without_none():
    call = {key: value for key, value in CALL.items() if key != "content"}
    first, other = none_filled()
    return [{**first, "messages": [USER, call]}, other]


def test_parquet_rows_lose_the_none_that_arrow_filled_in(tmp_path):
    pq.write_table(pa.Table.from_pylist(none_filled()), tmp_path / "rows.parquet")
    assert [row for _, row in read(tmp_path / "rows.parquet")] == expected_without_none()
    assert [number for number, _ in read(tmp_path / "rows.parquet", first_row=1)] == [2]


def test_datasets_folder_and_split(tmp_path):
    dataset = datasets.Dataset.from_list(none_filled())
    dataset.save_to_disk(tmp_path / "one")
    assert [row for _, row in read(tmp_path / "one")] == expected_without_none()
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    assert [row for _, row in read(tmp_path / "two", split="test")] == expected_without_none()[1:]
    with pytest.raises(UserError, match="two: has no split 'dev'; expected one of train, test"):
        read(tmp_path / "two", split="dev")


def test_plain_folder_reads_its_files_by_name(tmp_path, write_jsonl):
    write_jsonl(ROWS[1:], "b.jsonl")
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("not data")
    assert [(Path(row.path).name, number, row) for number, row in read(tmp_path)] == [
        ("a.parquet", 1, ROWS[0]),
        ("b.jsonl", 1, ROWS[1]),
        ("b.jsonl", 2, ROWS[2]),
    ]


def test_hub_id_goes_to_load_dataset(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(none_filled())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("org/name", subset="SFT", split="part", revision="abc")
    assert asked == [(("org/name", "SFT"), {"split": "part", "revision": "abc"})]
    assert [row for _, row in rows] == expected_without_none()
    assert rows[1][1].where == "org/name:2"


def test_hub_failure_is_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"^org/name: cannot be read .*split train, revision None\): no route; check pa"
    ):
        read("org/name")


@pytest.mark.parametrize(
    "lines, settings, message",
    [
        ([], {}, r"rows.jsonl: is empty; expected at least one row"),
        (ROWS, {"first_row": 3}, r"rows.jsonl: no row is left from first_row=3 on; lower first_row"),
        (
            ROWS,
            {"first_row": -1},
            r"rows.jsonl: first_row=-1, max_rows=None; expected first_row >= 0 and max_rows >= 1",
        ),
        (ROWS, {"max_rows": 0}, r"first_row=0, max_rows=0; expected first_row >= 0"),
        (
            ['{"a": 1}', '{"a" 1}'],
            {},
            r"rows.jsonl:2: is no JSON \(Expecting ':' delimiter at column 6\); expected one",
        ),
        (["[1]"], {}, r"rows.jsonl:1: is a JSON list; expected one JSON object per line"),
    ],
)
def test_unreadable_rows_are_refused(write_jsonl, lines, settings, message):
    with pytest.raises(UserError, match=message):
        read(write_jsonl(lines), **settings)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"no.jsonl: does not exist; expected a JSONL or Parquet file, a datasets folder"
    ):
        read(tmp_path / "no.jsonl")
    with pytest.raises(UserError, match=r"data/no.jsonl: does not exist"):
        read("data/no.jsonl")
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"rows.csv: is of no known kind; expected a name that ends in .jsonl, "):
        read(tmp_path / "rows.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no data file; expected files that end in .jsonl, "):
        read(tmp_path / "empty")
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"rows.parquet: is no readable Parquet file .*; write it again"):
        read(tmp_path / "rows.parquet")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:1: is no UTF-8 .*; save it as UTF-8"):
        read(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    "row, shape",
    [
        ({"messages": [USER, REPLY], "source": "mid"}, "messages"),
        ({**CHAT, "chat_template_kwargs": {"enable_thinking": True}, "source": "sft"}, "messages"),
        ({"messages": [USER, CALL, {"role": "tool", "content": "1"}], "tools": [{"name": "f"}]}, "messages"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]}, "messages"),
        ({"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "5"}], "prompt": "2+2?"}, "preference"),
        ({"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "5"}], "prompt": [USER]}, "preference"),
        ({"text": "words"}, "text"),
    ],
)
def test_known_shapes(row, shape):
    assert validate_row(row, "f:1") == shape


OTHER = {**REPLY, "content": "5"}


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"question": 1, "answer": 2},
            "f:1: has the columns question, answer; expected messages, or chosen and rejected",
        ),
        ({"messages": []}, "f:1: messages is empty; expected a list of messages, each with role and content"),
        ({"messages": "hi"}, "f:1: messages is a str; expected a list of messages"),
        ({"messages": ["hi"]}, r"f:1: messages\[0\] is a str; expected an object with role and content"),
        ({"messages": [{"content": "x"}]}, r"f:1: messages\[0\] has no role, only content; expected role and content"),
        (
            {"messages": [USER, {"role": "assistant"}]},
            r"f:1: messages\[1\] has no content; expected a string \(null only",
        ),
        (
            {"messages": [{"role": "user", "content": 4}]},
            r"f:1: messages\[0\].content is a int; expected a string or a",
        ),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            r"messages\[0\].role is 'human'; expected one of system, user",
        ),
        ({"messages": [USER]}, "f:1: messages has no assistant turn; expected at least one to train on"),
        (
            {"chosen": [USER, REPLY, USER], "rejected": [USER, REPLY, OTHER]},
            "f:1: chosen has no assistant turn after the shared prompt; there is nothing to prefer",
        ),
        ({"chosen": [USER, REPLY], "rejected": [USER, USER]}, "f:1: rejected has no assistant turn"),
        ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "f:1: chosen and rejected are equal; expected two"),
        (
            {"chosen": [REPLY], "rejected": [OTHER], "prompt": [USER]},
            "f:1: chosen and rejected share no prompt; expected",
        ),
        ({"chosen": [USER, REPLY], "rejected": [OTHER], "prompt": "x"}, "chosen and rejected share no prompt"),
        (
            {"chosen": [USER, REPLY], "rejected": [USER, OTHER], "prompt": 3},
            "f:1: prompt is a int; expected a string or",
        ),
        ({"chosen": "a", "rejected": "b"}, "f:1: chosen is a str; expected a list of messages"),
        ({"text": ""}, "f:1: text is empty; expected a string with content, or delete the row"),
        ({"text": 3}, "f:1: text is a int; expected a string with content"),
        ({**CHAT, "tools": "[]"}, "f:1: tools is a str; expected a list of JSON schemas or null"),
        ({**CHAT, "chat_template_kwargs": []}, "f:1: chat_template_kwargs is a list; expected an object or null"),
    ],
)
def test_broken_rows_are_refused(row, message):
    with pytest.raises(UserError, match=message) as error:
        validate_row(row, "f:1")
    assert "\n" not in str(error.value)


def test_fingerprint_follows_content_and_not_settings(tmp_path, write_jsonl):
    path = write_jsonl(ROWS)
    first = fingerprint(Source(path=path))
    assert first == fingerprint(Source(path=path, first_row=1, max_rows=1, weight=0.5))
    assert first == fingerprint(Source(path=write_jsonl(ROWS, "same.jsonl")))
    assert first != fingerprint(Source(path=write_jsonl(ROWS[:2], "less.jsonl")))
    folder = fingerprint(Source(path=str(tmp_path)))
    (tmp_path / "cache-1.arrow").write_text("what datasets' map leaves")
    assert folder == fingerprint(Source(path=str(tmp_path)))
    (tmp_path / "less.jsonl").rename(tmp_path / "renamed.jsonl")
    assert folder != fingerprint(Source(path=str(tmp_path)))


def test_fingerprint_of_a_hub_id_names_what_is_read():
    source = Source(path="org/name", subset="SFT", split="part", revision="abc")
    assert fingerprint(source) == "org/name@abc/SFT/part"
    assert fingerprint(Source(path="org/name")) == "org/name@main/default/train"


@pytest.mark.parametrize(
    "file, shape, count",
    [
        ("gsm8k/smoltalk2_mid.jsonl", "messages", 4000),
        ("gsm8k/smoltalk2_sft.jsonl", "messages", 3473),
        ("gsm8k/smoltalk2_preference.jsonl", "preference", 499),
        ("tau_airline/conversations.jsonl", "messages", 120),
    ],
)
def test_real_rows_are_accepted(shared_data, file, shape, count):
    rows = read(shared_data / file)
    assert [validate_row(row, row.where) for _, row in rows] == [shape] * count


def test_written_rows_come_back_equal(shared_data):
    path = shared_data / "tau_airline" / "conversations.jsonl"
    with path.open() as lines:
        assert [row for _, row in read(path)] == [json.loads(line) for line in lines]
