import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.data_files import get_data_patterns, resolve_pattern

from smolpost.errors import UserError
from smolpost.schema import Source
from tests.reading import ROWS, check_slices, read


def test_plain_folder_reads_its_files_by_name(tmp_path, write_jsonl):
    write_jsonl(ROWS[1:], "b.jsonl")
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("not data")
    assert [(Path(row.path).name, number, row) for number, row in read(tmp_path)] == [
        ("a.parquet", 1, ROWS[0]),
        ("b.jsonl", 1, ROWS[1]),
        ("b.jsonl", 2, ROWS[2]),
    ]


def test_patterns(tmp_path, write_jsonl):
    (tmp_path / "sub").mkdir()
    write_jsonl(ROWS[1:2], "part-2.jsonl")
    write_jsonl(ROWS[:1], "part-1.jsonl")
    pq.write_table(pa.Table.from_pylist(ROWS[2:]), tmp_path / "sub" / "part-3.parquet")
    assert [row for _, row in read(tmp_path / "part-*.jsonl")] == ROWS[:2]
    assert [row for _, row in read(tmp_path / "**" / "part-[13].*")] == [ROWS[0], ROWS[2]]
    check_slices(Source(path=str(tmp_path / "**" / "*-*"), first_row=1), 2, ROWS[1:])
    check_slices(Source(path=str(tmp_path / "**" / "*-*"), first_row=2), 2, ROWS[2:])
    with pytest.raises(UserError, match=r"rest-\*.jsonl: matches no file; check the pattern"):
        read(tmp_path / "rest-*.jsonl")
    with pytest.raises(UserError, match=r"part-\*.jsonl: has no split 'test'; expected one of train"):
        read(tmp_path / "part-*.jsonl", split="test")
    (tmp_path / "part-9.txt").write_text("notes")
    with pytest.raises(UserError, match=r"part-9.txt: is of no known kind"):
        read(tmp_path / "part-*")
    odd = write_jsonl(ROWS[:1], "odd[1].jsonl")
    assert read(odd) == [(1, ROWS[0])]  # a file of that very name is no pattern


LAYOUTS = [
    ["train.jsonl", "test.jsonl"],
    ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "dev.jsonl"],
    ["data/train-00000-of-00001.jsonl", "data/extra-00000-of-00001.jsonl", "other.jsonl"],
    ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl", "valid/a.jsonl"],
    ["my_train.jsonl", "val.jsonl", "eval.jsonl", "third.jsonl"],
    ["training_1.jsonl", "trainer.jsonl"],
    ["a.jsonl", "sub/b.jsonl", "sub/contest.jsonl"],
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=[names[0] for names in LAYOUTS])
def test_plain_folders_have_the_splits_that_datasets_finds(tmp_path, layout):
    for name in layout:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    patterns = get_data_patterns(str(tmp_path))
    for split, globs in patterns.items():
        expected = set()
        for pattern in globs:
            try:
                expected |= set(resolve_pattern(pattern, str(tmp_path)))
            except FileNotFoundError:
                continue
        found = [row.path for _, row in read(tmp_path, split=str(split))]
        assert found == sorted(expected)
    with pytest.raises(UserError, match=f"has no split 'none'; expected one of {', '.join(map(str, patterns))}"):
        read(tmp_path, split="none")


def test_split_names_that_are_no_words_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a b-00000-of-00001.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match=r"Split name should match .* got '\{'a b'\}'.; rename the files"):
        read(tmp_path)


def test_what_is_no_data_makes_no_split(tmp_path, write_jsonl):
    write_jsonl(ROWS[:1], "rows.jsonl")
    write_jsonl(['{"features": 1}'], "dataset_info.json")
    (tmp_path / "train_log.txt").write_text("not data")
    (tmp_path / ".cache").mkdir()
    write_jsonl(ROWS, ".cache/test.jsonl")
    assert read(tmp_path) == [(1, ROWS[0])]
    write_jsonl(ROWS[1:2], "test.jsonl")
    write_jsonl(ROWS[2:], "train.jsonl")
    assert [row for _, row in read(tmp_path, split="test+train")] == ROWS[1:]
