"""What is read back from a prepared folder is what was written, token by token."""

import json
from itertools import pairwise

import numpy as np
import prepared_folders as made
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolpost.chat.fates import Fate
from smolpost.errors import UserError
from smolpost.report.inspect import Prepared
from tests.report.prepared_folders import HOSTILE_PATH, HOSTILE_SOURCE


def test_every_token_once(sft):
    prepared, packs = sft
    assert prepared.kind == "sft" and len(prepared) == len(packs)
    for i, expected in enumerate(packs):
        pack = prepared.pack(i)
        assert len(pack.documents) == len(expected)
        start = 0
        for document, row in zip(pack.documents, expected, strict=True):
            np.testing.assert_array_equal(document.tokens.ids, row.ids[0])
            np.testing.assert_array_equal(document.tokens.fates, row.fates[0])
            np.testing.assert_array_equal(document.tokens.positions, np.arange(len(row.ids[0])))
            place = (document.row.source, document.row.path, document.row.number, document.row.think)
            assert place == (row.source, row.path, row.number, row.think)
            assert document.row.tokens == len(row.ids[0]) and document.start == start
            start += len(row.ids[0])
        assert pack.num_tokens == start


def test_pairs_count_on_from_their_prompt(apo):
    prepared, pairs = apo
    assert prepared.kind == "apo" and len(prepared) == len(pairs)
    for i, expected in enumerate(pairs):
        pair = prepared.pair(i)
        for part, ids, fates in zip(pair.parts, expected.ids, expected.fates, strict=True):
            np.testing.assert_array_equal(part.ids, ids)
            np.testing.assert_array_equal(part.fates, fates)
        assert pair.prompt.positions[0] == 0
        assert pair.chosen.positions[0] == pair.rejected.positions[0] == len(expected.ids[0])
        assert [part.name for part in pair.parts] == ["prompt", "chosen", "rejected"]
        assert pair.prompt.fates[-1] == Fate.TRAINED  # "The " of both sides


def test_runs_cover_the_tokens_and_alternate(sft):
    prepared, packs = sft
    for i in range(len(packs)):
        for document in prepared.pack(i).documents:
            runs = document.tokens.runs()
            assert [run[1] for run in runs[1:]] == [run[2] for run in runs[:-1]]
            assert runs[0][1] == 0 and runs[-1][2] == len(document.tokens.ids)
            assert all(a[0] != b[0] for a, b in pairwise(runs))
            for fate, start, stop in runs:
                assert (document.tokens.fates[start:stop] == fate).all()


def test_texts_join_to_what_was_tokenized(sft):
    prepared, packs = sft
    for i, pack in enumerate(packs):
        for document, row in zip(prepared.pack(i).documents, pack, strict=True):
            texts = prepared.texts(document.tokens.ids)
            assert len(texts) == len(document.tokens.ids)
            assert "".join(texts) == "".join(text for _, text in row.parts[0])


def test_a_character_of_several_tokens_stands_at_its_last(sft):
    prepared, _ = sft
    ids = prepared.tokenizer.encode("a😀b", add_special_tokens=False)
    assert prepared.texts(ids) == ["a", "", "", "", "😀", "b"]
    assert "".join(prepared.texts(ids[:3])) == prepared.tokenizer.decode(ids[:3])  # cut inside the character


def test_bytes_that_make_no_character_end(sft):
    prepared, _ = sft
    half = prepared.tokenizer.encode("😀", add_special_tokens=False)[0]
    assert "".join(prepared.texts([half] * 40)) == prepared.tokenizer.decode([half] * 40)


def places(prepared, **asked):
    return [(place.pack, place.document) for place in prepared.locate(prepared.find(**asked))]


def test_search(sft):
    prepared, _ = sft
    assert prepared.sources == ["everyday", "tools", HOSTILE_SOURCE]
    assert places(prepared) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert places(prepared, source="everyday") == [(0, 0), (2, 0), (2, 1)]
    assert places(prepared, row="1") == [(0, 0), (0, 1)]
    assert places(prepared, row="1", source="tools") == [(0, 1)]
    assert places(prepared, row="data/tools.jsonl:2") == places(prepared, row="tools.jsonl:2") == [(2, 2)]
    assert places(prepared, row=f"{HOSTILE_PATH}:7") == [(1, 0)]
    assert prepared.dropped(prepared.find(row="2")) == ["data/everyday.jsonl:2 overlong"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"source": "evry"}, r"source 'evry' is not in .*; it has everyday, tools, "),
        ({"row": "everyday.jsonl:2"}, r"row everyday.jsonl:2 was dropped: data/everyday.jsonl:2 overlong$"),
        ({"row": "99"}, r"row 99 is not in .*; it has .*data/everyday.jsonl:1 to 4, data/tools.jsonl:1 to 2, data/"),
        ({"row": "7", "source": "tools"}, r"row 7 of source tools is not in .*; it has data/tools.jsonl:1 to 2$"),
        ({"row": "ools.jsonl:1"}, r"row ools.jsonl:1 is not in"),  # half a file's name is another file
        ({"row": "tools"}, r"row 'tools' is neither PATH:N nor N"),
    ],
)
def test_search_says_what_is_there(sft, asked, says):
    with pytest.raises(UserError, match=says):
        sft[0].find(**asked)


def test_first_think_and_no_think_of_each_source(sft, apo):
    firsts = {
        name: {think: place and (place.pack, place.document) for think, place in by_thinking.items()}
        for name, by_thinking in sft[0].first_by_thinking().items()
    }
    assert firsts == {
        "everyday": {True: (2, 0), False: (0, 0)},
        "tools": {True: (0, 1), False: None},
        HOSTILE_SOURCE: {True: None, False: (1, 0)},
    }
    judged = apo[0].first_by_thinking()["judged"]
    assert (judged[True].pack, judged[False].pack) == (0, 1)


def test_no_such_pack_or_pair(sft, apo):
    with pytest.raises(UserError, match=r"pack 3 does not exist; .* has packs 0 to 2"):
        sft[0].pack(3)
    with pytest.raises(UserError, match=r"has the rows of an sft stage, which have no pairs"):
        sft[0].pair(0)
    with pytest.raises(UserError, match=r"pair -1 does not exist"):
        apo[0].pair(-1)


def test_only_prepared_folders_open(tmp_path):
    with pytest.raises(UserError, match=r"none is not a folder"):
        Prepared(tmp_path / "none")
    made.write_sft(tmp_path / "sft")
    for name in ("rows.parquet", "manifest.json", "data_report.json", "state.json"):
        hidden = (tmp_path / "sft" / name).rename(tmp_path / "hidden")
        with pytest.raises(UserError, match=rf"sft is not a prepared folder: it has no {name}; .* `smolpost prepare`"):
            Prepared(tmp_path / "sft")
        hidden.rename(tmp_path / "sft" / name)
    (tmp_path / "sft" / "data_report.json").write_text("{")
    with pytest.raises(UserError, match=r"data_report.json is not JSON"):
        Prepared(tmp_path / "sft")


def test_a_file_cut_short_is_no_prepared_folder(tmp_path):
    made.write_sft(tmp_path / "sft")
    file = tmp_path / "sft" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match=r"its rows cannot be read"):
        Prepared(tmp_path / "sft")


@pytest.mark.parametrize(("column", "value"), [("seq_lengths", [190]), ("fates", [0]), ("rows", [])])
def test_a_contradiction_is_not_shown_as_truth(tmp_path, column, value):
    folder = tmp_path / "sft"
    made.write_sft(folder)
    file = folder / "data-00000-of-00001.arrow"
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    values = table.column(column).to_pylist()
    values[1] = value
    field = table.schema.field(column)
    table = table.set_column(table.column_names.index(column), field, pa.array(values, field.type))
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    prepared = Prepared(folder)
    assert prepared.pack(0).num_tokens == 170
    with pytest.raises(UserError, match=r"ids, fates and lengths of pack 1 contradict each other"):
        prepared.pack(1)


def test_opening_and_reading_one_pack_leaves_the_rest_on_disk(tmp_path):
    """10 million tokens: only the pack asked for may come into memory."""
    folder, tokens = tmp_path / "sft", 2**14
    packs = made.write_sft(folder)
    file = folder / "data-00000-of-00001.arrow"
    schema = pa.ipc.open_stream(file.read_bytes()).schema
    long = np.zeros(tokens, np.int32)
    columns = {"input_ids": long, "fates": long + Fate.USER, "seq_lengths": [tokens], "rows": [2]}
    lists = [pa.array([columns[name]] * 16, schema.field(name).type) for name in schema.names]
    with pa.ipc.new_stream(file, schema) as stream:
        for _ in range(40):
            stream.write_batch(pa.RecordBatch.from_arrays(lists, schema=schema))
    del lists, packs
    before = pa.total_allocated_bytes()
    prepared = Prepared(folder)
    pack = prepared.pack(639)
    assert len(prepared) == 640 and pack.num_tokens == tokens
    assert pa.total_allocated_bytes() - before < 10 * tokens
    assert file.stat().st_size > 50e6
    assert [place.pack for place in prepared.locate(prepared.find(row="7"))][-1] == 639


def test_rows_in_several_row_groups(tmp_path):
    folder = tmp_path / "sft"
    packs = made.write_sft(folder)
    table = pq.read_table(folder / "rows.parquet")
    pq.write_table(table, folder / "rows.parquet", row_group_size=2)
    prepared = Prepared(folder)
    expected = [(row.source, row.path, row.number) for pack in packs for row in pack]
    read = [prepared.row(i) for i in range(len(expected))]
    assert [(row.source, row.path, row.number) for row in read] == expected
    assert json.loads((folder / "manifest.json").read_text()) == prepared.manifest
