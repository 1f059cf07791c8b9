from itertools import accumulate
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolpost.data import arrow_rows
from smolpost.data.sources import fingerprint, read_slice, slices
from smolpost.errors import UserError
from smolpost.schema import Source
from tests.reading import check_slices, read, saved

USER, REPLY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CHAT = {"messages": [USER, REPLY]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}


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


@settings(deadline=None, max_examples=60)
@given(
    groups=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    size=st.integers(1, 12),
    first_row=st.integers(0, 4),
    max_rows=st.none() | st.integers(1, 20),
    batch=st.integers(1, 4),
)
def test_parquet_pieces(tmp_path_factory, groups, size, first_row, max_rows, batch):
    path = tmp_path_factory.mktemp("groups") / "rows.parquet"
    rows = [{"text": str(i)} for i in range(sum(groups))]
    ends = list(accumulate(groups))
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()})) as writer:
        for begin, end in zip([0, *ends], ends, strict=False):
            writer.write_table(pa.Table.from_pylist(rows[begin:end]))
    source, expected = Source(path=str(path), first_row=first_row, max_rows=max_rows), rows[first_row:][:max_rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow_rows, "rows_at_a_time", lambda *_: batch)
        if not expected:
            with pytest.raises(UserError, match="no row is left"):
                slices(source, size)
            return
        cut = check_slices(source, size, expected)
    for piece in cut:  # a piece that crosses a row group's end holds whole groups only, or the rest of a cut one
        inner = [end for end in ends if piece.begin < end < piece.end]
        assert not inner or piece.end in (*ends, first_row + len(expected))


def test_pieces_of_one_row_group_decode_it_once(tmp_path, monkeypatch):
    rows = [{"text": str(i)} for i in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    decoded = []

    class Counted(pq.ParquetFile):
        def iter_batches(self, *args, **kwargs):
            for batch in super().iter_batches(*args, **kwargs):
                decoded.append(len(batch))
                yield batch

    monkeypatch.setattr(pq, "ParquetFile", Counted)
    monkeypatch.setattr(arrow_rows, "rows_at_a_time", lambda *_: 10)
    source = Source(path=str(tmp_path / "rows.parquet"))
    cut = slices(source, 7)
    assert [row for piece in cut for row in read_slice(source, piece)] == rows
    assert decoded == [10] * 6


def test_datasets_folder_pieces_and_joined_splits(tmp_path):
    both = {name: saved(tmp_path / "both" / name, rows) for name, rows in (("train", 5), ("test", 3))}
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = Source(path=str(tmp_path / "both"), split="test+train")
    cut = check_slices(source, 2, both["test"] + both["train"])
    assert [piece.num_rows for piece in cut] == [2, 1, 2, 2, 1]
    assert [piece.num_rows for piece in slices(Source(path=source.path, first_row=1, max_rows=3), 2)] == [2, 1]
    assert [Path(row.path).name for _, row in read(source.path, split="test", first_row=2)] == ["test"]
    with pytest.raises(
        UserError, match=r"no split 'train\[:2\]'; .* slices are for Hub ids, use first_row and max_rows"
    ):
        read(source.path, split="train[:2]")


def test_hub_pieces(monkeypatch):
    rows = [{"text": str(i)} for i in range(5)]
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append(kwargs["split"])
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_slices(Source(path="org/name", split="a+b[:3]"), 2, rows)
    assert calls == ["a+b[:3]"] * 2  # once by each `slices`, never by a piece


def test_json_columns_are_read(tmp_path):
    written = [{"a": {"x": {"z": 0}}, "b": [{"y": [1, None]}, "s"], "c": 1}, {"a": 2, "b": [], "c": None}]
    kinds = datasets.Features({"a": datasets.Json(), "b": datasets.List(datasets.Json()), "c": datasets.Value("int64")})
    dataset = datasets.Dataset.from_list(written, features=kinds)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    for path in ("saved", "rows.parquet"):
        assert [row for _, row in read(tmp_path / path)] == [written[0], {"a": 2, "b": []}]


def test_map_columns_become_objects(tmp_path):
    kind = pa.struct({"args": pa.map_(pa.string(), pa.struct({"x": pa.int64(), "y": pa.int64()}))})
    calls = pa.array([{"args": [("k", {"x": 1, "y": None})]}, {"args": None}, {"args": [("a", None)]}], kind)
    pq.write_table(pa.table({"call": calls}), tmp_path / "rows.parquet")
    assert [row for _, row in read(tmp_path / "rows.parquet")] == [
        {"call": {"args": {"k": {"x": 1}}}},
        {"call": {}},
        {"call": {"args": {}}},
    ]
    twice = pa.array([[("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"call": twice}), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice.parquet:1: holds a map with a key twice .*; write the row again"):
        read(tmp_path / "twice.parquet")


def test_text_that_is_no_utf8_is_refused_by_row(tmp_path):
    offsets = pa.array([0, 1, 3, 4], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xff\xfeb"))
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet:2: holds text that is not UTF-8 .*; write the row again"):
        read(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", first_row=2) == [(3, {"text": "b"})]


@pytest.mark.parametrize("state, key", [("{}", "_split"), ("no JSON", "_split"), ('{"_split": null}', "_data_files")])
def test_damaged_datasets_folders_are_refused(tmp_path, state, key):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match=f"state.json: has no {key} as datasets.save_to_disk writes it .*; save the"):
        fingerprint(Source(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"cannot be read as a file, folder or Hub dataset|has no _split"):
        read(tmp_path)


def test_files_of_one_source_may_have_different_columns(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"text": "b", "source": 3}]), tmp_path / "b.parquet")
    assert [row for _, row in read(tmp_path)] == [{"text": "a"}, {"text": "b", "source": 3}]
