"""A saved conversation is one complete line, whatever else happens to the file."""

import json
import os

import pytest

from smolpost.errors import UserError
from smolpost.talk.saved import SavedRow


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_row_is_replaced_where_it_is_and_others_stay(tmp_path):
    file = tmp_path / "new" / "chats.jsonl"
    first, second = SavedRow(file), SavedRow(file)
    first.write({"messages": [1]})
    second.write({"messages": [2]})
    first.write({"messages": [1, "é\n"]})
    assert rows(file) == [{"messages": [1, "é\n"]}, {"messages": [2]}]
    first.write(None)
    assert rows(file) == [{"messages": [2]}]
    second.leave()
    second.write({"messages": [3]})
    assert rows(file) == [{"messages": [2]}, {"messages": [3]}]


def test_rows_of_others_stay_where_they_write_meanwhile(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [0]}')  # without its line break
    saved = SavedRow(file)
    saved.write({"messages": [1]})
    with open(file, "a") as other:
        other.write('{"messages": [2]}\n')
    saved.write({"messages": [1, 1]})
    assert rows(file) == [{"messages": [0]}, {"messages": [1, 1]}, {"messages": [2]}]
    file.write_text("")  # somebody took the rows away: this one is added
    saved.write({"messages": [1, 1, 1]})
    assert rows(file) == [{"messages": [1, 1, 1]}]


def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "chats.jsonl"
    saved = SavedRow(file)
    saved.write({"messages": [1]})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        saved.write({"messages": [1, 2]})
    assert rows(file) == [{"messages": [1]}] and [p.name for p in tmp_path.glob("*")] in (
        ["chats.jsonl", ".chats.jsonl.lock"], [".chats.jsonl.lock", "chats.jsonl"]
    )  # fmt: skip


def test_what_is_not_a_file_of_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is a folder; name a JSONL file, such as .*chats\.jsonl"):
        SavedRow(tmp_path)
    (tmp_path / "notes.txt").write_text("hello\nthere")
    with pytest.raises(UserError, match=r"notes\.txt:2: is not JSON .*; conversations are added to a JSONL file"):
        SavedRow(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "hello\nthere"
