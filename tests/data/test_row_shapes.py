"""A row shape from outside the library: rows are prepared with it, and recipes may name it."""

import subprocess
import sys

import pytest

from smolpost import recipe
from smolpost.data.row_shapes.shape import row_shape
from smolpost.errors import UserError
from smolpost.registry import ROW_SHAPES
from smolpost.stages.sft import SFTStage
from tests.prepared import prepared


@pytest.fixture
def faq(monkeypatch):
    """The shape faq: a question, and the best of its answers as the place in their list."""
    monkeypatch.setattr(ROW_SHAPES, "_entries", dict(ROW_SHAPES))

    @row_shape("faq")
    def faq(row, source):
        if "best" not in row:
            raise UserError(f"{row.where}: has no best; columns=faq expects question, answers and best")
        turns = [(source.roles.get("asker", "user"), row["question"]), ("assistant", row["answers"][row["best"]])]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_rows_of_a_registered_shape_are_prepared_as_ours(faq, tokenizer, tmp_path):
    stage = SFTStage(init_from="a", data="b", max_seq_len=300, learning_rate=1e-3, global_batch_size=1, num_workers=1)
    theirs = [{"question": "6*7?", "answers": ["41", "42"], "best": 1}, {"question": "1?", "answers": ["1"], "best": 0}]
    ours = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in (("6*7?", "42"), ("1?", "1"))
    ]
    found = []
    for name, rows, columns in (("theirs", theirs, "faq"), ("ours", ours, "smoltalk2")):
        (folder := tmp_path / name).mkdir()
        dataset, report = prepared(stage, rows, tokenizer, folder, {"only": {"columns": columns}})
        found.append((dataset.to_list(), report["sources"]))
    assert found[0] == found[1] and len(found[0][0]) > 0


def test_what_a_shape_refuses_is_named(faq, tokenizer, tmp_path):
    stage = SFTStage(init_from="a", data="b", max_seq_len=300, learning_rate=1e-3, global_batch_size=1, num_workers=1)
    with pytest.raises(UserError, match=r"only.jsonl:1: has no best; columns=faq expects question, answers and best"):
        prepared(stage, [{"question": "6*7?"}], tokenizer, tmp_path, {"only": {"columns": "faq"}})


def test_recipes_may_name_a_registered_shape(faq):
    words = ["pipeline=tiny", "+data.mine.sources.a={path:x,columns:faq}"]
    assert recipe.load(words).recipe.data["mine"].sources["a"].columns == "faq"


def test_shapes_import_no_torch():
    """Planning checks a source's columns; torch alone would take a second of its two."""
    code = "import sys; import smolpost.data.row_shapes; assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
