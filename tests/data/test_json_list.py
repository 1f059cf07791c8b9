"""Files that are one list of rows: the same rows as in JSONL, wherever the file is cut."""

import gzip
import json

import pytest

from smolpost.data.sources import read_rows, read_slice, slices
from smolpost.errors import UserError
from smolpost.schema import Source

ROWS = [{"text": f"row {i}: [é]", "n": [i, {"a": "]"}]} for i in range(23)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz"])
@pytest.mark.parametrize("begin", ["", "\ufeff", "\n "])
def test_rows_of_a_list_are_those_of_jsonl(tmp_path, indent, suffix, begin):
    file = tmp_path / f"rows{suffix}"
    content = (begin + json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n").encode()
    file.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    for first_row, max_rows in ((0, None), (5, None), (5, 11), (22, 1)):
        source = Source(path=str(file), first_row=first_row, max_rows=max_rows)
        expected = list(enumerate(ROWS, start=1))[first_row:][:max_rows]
        assert list(read_rows(source)) == expected
        cut = slices(source, 4)
        assert [row for piece in cut for row in read_slice(source, piece)] == [row for _, row in expected]
        assert sum(piece.num_rows for piece in cut) == len(expected)
        if not suffix.endswith(".gz"):
            assert max(piece.num_rows for piece in cut) <= 4


def test_a_bad_element_is_its_own_rows_fault(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[{"text": "a"}, [1], {"k": 1, "k": 2}, {"x": NaN}, {"text": "b"}]')
    rows = [row for _, row in read_rows(Source(path=str(file)), faults=True)]
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert [row.fault.split(":", 2)[-1].split(";")[0] if row.fault else dict(row) for row in rows] == [
        {"text": "a"},
        " is a JSON list",
        " holds the key 'k' twice in one object",
        " holds NaN, which is not JSON",
        {"text": "b"},
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"a": 1}', r"rows.json:1: is followed by ''; expected , or the \]"),
        ('[{"a": 1} {"a": 2}]', r"rows.json:1: is followed by '{\"a\": 2}\]'"),
        ('[{"a": 1}, {"a" 2}]', r"rows.json:2: is not JSON \(Expecting ':' delimiter: line 1 column 17"),
        ('[{"a": 1}]\n{"a": 2}', "rows.json: continues after its list; expected one list, or one object per line"),
        ("[]", "rows.json: is empty; expected at least one row"),
    ],
)
def test_broken_lists_are_refused(tmp_path, content, message):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(Source(path=str(tmp_path / "rows.json"))))
