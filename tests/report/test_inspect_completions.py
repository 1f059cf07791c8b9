"""Completions with labels, read back and shown."""

import io
import json
import re

import pytest
from rich.console import Console

from smolpost.chat.fates import Fate
from smolpost.data.settings import CompletionRows, LabelledRows
from smolpost.errors import UserError
from smolpost.report.inspect import Prepared
from smolpost.report.page import write_page
from smolpost.report.terminal import show
from tests.char_model import char_tokenizer
from tests.prepared import prepared

USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("four", "five"))


def folder_of(stage, rows, folder):
    tokenizer = char_tokenizer()
    prepared(stage, rows, tokenizer, folder)
    tokenizer.save_pretrained(folder / "rows" / "tokenizer")
    (folder / "rows" / "manifest.json").write_text(json.dumps({"key": "k"}))
    return Prepared(folder / "rows")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    rows = [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"messages": [USER, BAD], "label": 0}]
    stage = LabelledRows(data="mixed", max_seq_len=2000, num_workers=1)
    return folder_of(stage, rows, tmp_path_factory.mktemp("judged"))


def test_completions_are_read_back(judged):
    assert judged.layout == "labelled" and len(judged) == 3
    found = [judged.completion(number) for number in range(3)]
    assert [item.label for item in found] == [True, False, False]
    assert [item.row.number for item in found] == [1, 1, 2]
    assert ["".join(judged.texts(item.completion.ids)) for item in found] == [
        "four<|im_end|>", "five<|im_end|>", "five<|im_end|>",
    ]  # fmt: skip
    for item in found:
        assert item.completion.first_position == len(item.prompt.ids)
        assert set(item.completion.fates) == {Fate.TRAINED} and Fate.TRAINED not in item.prompt.fates
    with pytest.raises(UserError, match="has labelled, and no pairs"):
        judged.pair(0)
    with pytest.raises(UserError, match="completion 3 does not exist"):
        judged.completion(3)


def printed(found, **asked):
    file = io.StringIO()
    show(found, Console(file=file, width=160, color_system=None), **asked)
    return file.getvalue()


def test_the_terminal_says_which_are_desired(judged):
    text = printed(judged, limit=2)
    titles = re.findall(r"══ (completion \d+  \w+)  only ", text)
    assert titles == ["completion 0  desired", "completion 1  undesired"]
    assert "shown 2 of 3 completions" in text and "shared by both sides" not in text
    assert "3 completions (1 desired, 2 undesired) of" in text
    assert "completion 2  undesired" in printed(judged, row="2")
    assert "shown 1 of 2 completions" in printed(judged, row="1")


def test_the_page_says_it_too(judged, tmp_path):
    write_page(judged, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    data = json.loads(re.search(r"<script[^>]*application/json[^>]*>(.*?)</script>", text, re.DOTALL)[1])
    units = [[data["units"][unit] for unit in group["units"]] for group in data["groups"]]
    assert [[unit["name"] for unit in group] for group in units] == [["prompt", "completion"]] * 3
    assert [group[0]["label"] for group in units] == ["desired", "undesired", "undesired"]
    assert data["what"] == "completions" and "<h2>Completions</h2>" in text


def test_without_labels(tmp_path):
    found = folder_of(CompletionRows(data="m", max_seq_len=2000, num_workers=1), [{"messages": [USER, GOOD]}], tmp_path)
    assert found.layout == "completions" and found.completion(0).label is None
    assert "══ completion 0  only " in printed(found)
