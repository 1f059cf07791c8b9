import multiprocessing

import pytest

from smolpost.data.sources import fingerprint, read_slice, slices
from smolpost.errors import UserError
from smolpost.schema import Source
from tests.reading import ROWS, check_slices, read, saved


@pytest.mark.parametrize(
    "first, most, kept", [(0, None, [1, 2, 3]), (1, None, [2, 3]), (0, 2, [1, 2]), (1, 1, [2]), (2, 9, [3])]
)
def test_first_row_and_max_rows(write_jsonl, first, most, kept):
    assert [number for number, _ in read(write_jsonl(ROWS), first_row=first, max_rows=most)] == kept


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
            r"rows.jsonl:2: is not JSON \(Expecting ':' delimiter at column 6\); expected one",
        ),
        (["[1]"], {}, r"rows.jsonl:1: is a JSON int; expected an object in the list"),
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
    with pytest.raises(UserError, match=r"rows.csv: is of no known kind; expected names that end in .jsonl, "):
        read(tmp_path / "rows.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: has no data file; expected names that end in .jsonl, "):
        read(tmp_path / "empty")
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"rows.parquet: is not a readable Parquet file .*; write it again"):
        read(tmp_path / "rows.parquet")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:1: is not UTF-8 .*; save it as UTF-8"):
        read(tmp_path / "latin.jsonl")


def test_empty_files_are_refused_among_others(tmp_path, write_jsonl):
    write_jsonl(ROWS, "a.jsonl")
    write_jsonl(["", " "], "b.jsonl")
    with pytest.raises(UserError, match=r"b.jsonl: is empty; expected at least one row; delete the file or write it"):
        read(tmp_path)


def test_other_processes_read_pieces(write_jsonl):
    source = Source(path=write_jsonl([{"text": str(i)} for i in range(50)]))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rows = pool.starmap(rows_of, [(source, piece) for piece in slices(source, 20)])
    assert [[row["text"] for row in part] for part in rows] == [
        [str(i) for i in span] for span in (range(20), range(20, 40), range(40, 50))
    ]
    assert rows[1][0].where == f"{source.path}:21"


def rows_of(source, piece):
    return list(read_slice(source, piece))


def test_pieces_end_with_max_rows(write_jsonl):
    rows = [{"text": str(i)} for i in range(10)]
    cut = check_slices(Source(path=write_jsonl(rows), first_row=1, max_rows=3), 2, rows[1:4])
    assert [(piece.first, piece.num_rows, piece.line) for piece in cut] == [(0, 2, 2), (2, 1, 4)]


def test_a_file_that_changes_between_counting_and_reading_is_refused(write_jsonl):
    source = Source(path=write_jsonl(ROWS))
    cut = slices(source, 9)
    write_jsonl(ROWS[:2])
    with pytest.raises(
        UserError, match=r"rows.jsonl: has 2 rows from row 1 on, but 3 were counted: the file was changed"
    ):
        list(read_slice(source, cut[0]))


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


def test_fingerprint_is_of_the_files_that_are_read(tmp_path, write_jsonl):
    write_jsonl(ROWS[:1], "train.jsonl")
    write_jsonl(ROWS[1:], "test.jsonl")
    train, test = (fingerprint(Source(path=str(tmp_path), split=split)) for split in ("train", "test"))
    pattern = fingerprint(Source(path=str(tmp_path / "t*.jsonl")))
    assert len({train, test, pattern}) == 3
    assert train == fingerprint(Source(path=str(tmp_path), columns="alpaca", rename={"a": "b"}))
    (tmp_path / "notes.txt").write_text("not read")
    write_jsonl(ROWS, "test.jsonl")
    assert train == fingerprint(Source(path=str(tmp_path)))
    assert test != fingerprint(Source(path=str(tmp_path), split="test"))
    assert pattern != fingerprint(Source(path=str(tmp_path / "t*.jsonl")))


def test_fingerprint_follows_a_moved_folder(tmp_path, write_jsonl):
    (tmp_path / "one").mkdir()
    write_jsonl(ROWS, "one/a.jsonl")
    saved(tmp_path / "one" / "saved")
    paths = [("one",), ("one", "*.jsonl"), ("one", "saved")]
    before = [fingerprint(Source(path=str(tmp_path.joinpath(*path)))) for path in paths]
    (tmp_path / "one").rename(tmp_path / "two")
    assert before == [fingerprint(Source(path=str(tmp_path.joinpath("two", *path[1:])))) for path in paths]
    (tmp_path / "two" / "saved" / "cache-1.arrow").write_text("what datasets' map leaves")
    assert before[2] == fingerprint(Source(path=str(tmp_path / "two" / "saved")))
