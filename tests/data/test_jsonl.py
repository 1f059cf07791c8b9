import gzip
import json
import time

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolpost.data import jsonl
from smolpost.data.paths import COMPRESSIONS
from smolpost.data.rows import without_nulls
from smolpost.data.sources import read_rows, read_slice, slices
from smolpost.errors import UserError
from smolpost.schema import Source
from tests.reading import ROWS, check_slices, read


def test_jsonl_rows_keep_their_own_keys_and_line_numbers(write_jsonl):
    path = write_jsonl([ROWS[0], "", ROWS[1], {"text": "four", "none": None}])
    assert read(path) == [(1, ROWS[0]), (3, ROWS[1]), (4, {"text": "four"})]
    assert read(path)[1][1].where == f"{path}:3"


def test_gzipped_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n'))
    assert read(path) == [(1, ROWS[0])]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        UserError, match=r"rows.jsonl.gz: is not a readable complete compressed file .* compress it again"
    ):
        read(path)


def test_written_rows_come_back_equal(rows_file):
    path = rows_file("tools")
    with path.open() as lines:
        assert [row for _, row in read(path)] == [without_nulls(json.loads(line)) for line in lines]


# A line is a row's text, or what stands between rows; U+2028, U+0085 and a lone \r end no line of JSONL.
TEXTS = st.text(st.sampled_from("ab \u2028\u0085\u00e9\U0001f600{}"), max_size=6)
LINES = st.lists(
    TEXTS.map(lambda text: json.dumps({"text": text}, ensure_ascii=False)) | st.sampled_from(["", " ", "\t \r"])
)


@settings(deadline=None)
@given(
    lines=LINES,
    indent=st.sampled_from(["", " ", "\t"]),
    end=st.sampled_from(["\n", "\r\n"]),
    last_end=st.booleans(),
    mark=st.booleans(),
    window=st.integers(1, 40) | st.just(4096),
    size=st.integers(1, 5),
    first_row=st.integers(0, 3),
    max_rows=st.none() | st.integers(1, 5),
    suffix=st.sampled_from(["", ".gz", ".zst"]),
)
def test_jsonl_pieces(tmp_path_factory, lines, indent, end, last_end, mark, window, size, first_row, max_rows, suffix):
    lines = [indent + line for line in lines]
    text = end.join(lines) + (end if last_end else "")
    path = tmp_path_factory.mktemp("lines") / f"rows.jsonl{suffix}"
    with pa.output_stream(path, compression=COMPRESSIONS.get(suffix)) as file:
        file.write(b"\xef\xbb\xbf" * mark + text.encode())
    numbered = [(i, json.loads(line)) for i, line in enumerate(lines, start=1) if line.strip()]
    expected = numbered[first_row:][:max_rows]
    source = Source(path=str(path), first_row=first_row, max_rows=max_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "WINDOW_BYTES", max(window, 4) if suffix else window)
        if not expected:
            with pytest.raises(UserError, match="no row is left" if numbered else "is empty"):
                slices(source, size)
            return
        check_slices(source, size, [row for _, row in expected], whole=bool(suffix))
    assert list(read_rows(source)) == expected


def test_a_broken_line_is_its_own_rows_fault(write_jsonl):
    path = write_jsonl([ROWS[0], ROWS[1], '{"text"', ROWS[2]])
    source = Source(path=path)
    good, bad = slices(source, 2)
    assert list(read_slice(source, good)) == ROWS[:2]
    broken, whole = read_slice(source, bad)
    assert broken.fault.startswith(f"{path}:3: is not JSON") and broken.number == 3
    assert (whole, whole.number, whole.fault) == (ROWS[2], 4, None)
    with pytest.raises(UserError, match=r"rows.jsonl:3: is not JSON"):
        read(path)
    assert read(path, first_row=3) == [(4, ROWS[2])]


def test_counting_does_not_parse(tmp_path):
    line = b'{"messages": [{"role": "user", "content": "' + b"word " * 100 + b'"}]}\n'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line * 100_000)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        cut = slices(Source(path=str(path)), 1000)
        seconds.append(time.perf_counter() - start)
    assert len(cut) == 100
    assert path.stat().st_size / 1e6 / min(seconds) > 200  # MB/s; 2000 on an idle core, where json.loads reaches 130


@pytest.mark.parametrize(
    "start, name", [(b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"), (b"\xff\xfe\0\0", "UTF-32"), (b"{\0", "UTF-16")]
)
def test_other_encodings_are_refused_by_name(tmp_path, start, name):
    for path, packed in ((tmp_path / "rows.jsonl", start), (tmp_path / "rows.jsonl.gz", gzip.compress(start))):
        path.write_bytes(packed)
        with pytest.raises(UserError, match=f"{path.name}: is {name}; save it as UTF-8, for example with `iconv -f"):
            read(path)


@pytest.mark.parametrize("suffix, kind", [(".gz", "gzip"), (".zst", "zstd")])
def test_joined_and_broken_compressed_files(tmp_path, suffix, kind):
    path = tmp_path / f"rows.jsonl{suffix}"
    with pa.output_stream(path, compression=kind) as file:
        file.write(b'{"text": "one"}\n')
    once = path.read_bytes()
    path.write_bytes(once + once)  # what `cat a.gz b.gz` makes
    assert read(path) == [(1, ROWS[0]), (2, ROWS[0])]
    for broken in (once[:-5], b"no such thing", once + b"no such thing"):
        path.write_bytes(broken)
        with pytest.raises(
            UserError, match=f"rows.jsonl{suffix}: is not a readable complete compressed file .*; compress it again"
        ):
            read(path)
