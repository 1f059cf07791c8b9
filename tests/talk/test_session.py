"""What users type: commands, prompts, results of calls; for one model and for two."""

import json

import pytest

from smolpost.talk.conversation import Tools
from smolpost.talk.settings import Settings


def last(script):
    return script.notes[-2]  # before the last prompt


def test_undo_retry_clear_and_history(rigged, chat):
    replies = iter("ABCDE")
    session, script = chat(
        [rigged(lambda prompt: next(replies))],
        ["one", "two", "/retry", "/history", "/undo", "/retry", "/undo", "/undo", "/clear", "/history", "/exit", "x"],
    )
    assert [said.answer for _, said, _ in script.said] == ["A", "B", "C", "D"]
    assert [said.seed for _, said, _ in script.said] == [0, 0, 1, 1]  # another try takes the next seed
    assert "user: one\nassistant: A\nuser: two\nassistant: C" in script.notes
    assert [note for note in script.notes if note.startswith("taken back")] == ["taken back: two", "taken back: one"]
    assert "there is nothing to take back" in script.notes and "nothing was said yet" in script.notes
    assert session.conversations[0].turns == [] and next(session.view.lines) == "x"


def test_settings_and_modes_hold_from_the_next_reply_on(rigged, chat):
    speaker = rigged("a")
    session, script = chat(
        [speaker],
        ["/set temperature=0.2 top_k=5 seed=9", "/set top_p=2", "/set speed=1", "/no_think", "hi", "/think", "hi",
         "/set seed=none max_new_tokens=none"],
    )  # fmt: skip
    assert "temperature=0.2 top_p=0.95 top_k=5 max_new_tokens=none seed=9" in script.notes
    assert "top_p=2.0 is not a number above 0 and up to 1; try top_p=0.95" in script.notes
    assert any(note.startswith("speed=1 is not a setting; write NAME=VALUE with one of: temp") for note in script.notes)
    assert [said.mode for _, said, _ in script.said] == [False, True]
    assert [said.seed for _, said, _ in script.said] == [9, 9]
    assert session.settings == Settings(0.2, 0.95, 5, None, None)
    assert "Reasoning Mode: /no_think" in speaker.model.prompts[0] and "Mode: /think" in speaker.model.prompts[1]
    assert {"think> ", "no_think> "} <= set(script.notes)


def test_a_system_message_that_decides_the_mode_is_told(rigged, chat):
    _, script = chat([rigged("a")], ["/system Be brief. /no_think", "/think", "/system Be brief."])
    told = [note for note in script.notes if "changes nothing" in note]
    assert told == [
        "sft: /think changes nothing, as its system message decides the mode; /system TEXT without /think and "
        "/no_think frees it"
    ]
    assert script.notes[-1] == "think> "


def test_an_empty_or_failed_reply_leaves_the_prompt_for_retry(rigged, chat, tmp_path):
    replies, file = iter(["", "B", "C"]), tmp_path / "chats.jsonl"
    session, script = chat([rigged(lambda prompt: next(replies))], ["one", "/retry", "two"], save=file)
    assert script.said[0][1:] == (None, ["sft said nothing; /retry asks again"])
    assert [m["content"] for m in session.conversations[0].messages] == ["one", "B", "two", "C"]
    assert len(file.read_text().splitlines()) == 1


def test_a_cut_reply_is_context_and_no_row_by_itself(rigged, chat, tmp_path):
    replies, file = iter(["abcdef", "yes"]), tmp_path / "chats.jsonl"
    lines = ["/set max_new_tokens=3", "one", "/save " + str(file), "/set max_new_tokens=9", "two"]
    _, script = chat([rigged(lambda prompt: next(replies))], lines)
    assert script.said[0][2][0] == "cut at 3 tokens; /set max_new_tokens=6 and /retry allow more"
    assert f"nothing is in {file} yet; it is written again after each reply that ends by itself" in script.notes
    [row] = map(json.loads, file.read_text().splitlines())
    assert [m.get("train") for m in row["messages"]] == [None, False, None, None]


def test_each_conversation_is_a_row_and_a_retry_replaces_the_reply(rigged, chat, tmp_path):
    replies, file = iter("ABCD"), tmp_path / "chats.jsonl"
    lines = ["one", "/retry", "/clear", "two", "/undo"]
    chat([rigged(lambda prompt: next(replies))], lines, save=file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [[m["content"] for m in row["messages"]] for row in rows] == [["one", "B"]]


def test_two_models_have_a_history_each_and_share_prompts_and_settings(rigged, chat, tmp_path):
    one, two = rigged("from one", "sft"), rigged("from two", "apo")
    file = tmp_path / "chats.jsonl"
    _, script = chat([one, two], ["a", "b"], save=file)
    assert [(place, said.answer, said.seed) for place, said, _ in script.said] == [
        (0, "from one", 0), (1, "from two", 0), (0, "from one", 0), (1, "from two", 0),
    ]  # fmt: skip
    assert "from one" in one.model.prompts[1] and "from two" not in one.model.prompts[1]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["source"] for row in rows] == ["chat/sft", "chat/apo"]
    assert all(len(row["messages"]) == 4 for row in rows)


def test_two_models_that_call_get_the_result_of_the_same_call_once(rigged, chat, tmp_path):
    def reply(prompt):
        return (
            "done" if "<tool_response>4" in prompt else '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'
        )

    (file := tmp_path / "tools.json").write_text('["add(a: int) -> int"]')
    session, script = chat(
        [rigged(reply), rigged(reply)], ["/no_think", f"/tools {file}", "2+2?", "/result 4", "/result 5"]
    )
    assert session.names == ["sft (1)", "sft (2)"]
    assert "result of add(a=2)> " in script.notes
    assert [said.answer for _, said, _ in script.said][2:] == ["done", "done"]
    assert "no call waits for a result; /tools FILE gives the model tools to call" in script.notes
    row = session.conversations[0].row("chat")
    assert row["chat_template_kwargs"]["xml_tools"] == ["add(a: int) -> int"] and "tools" not in row


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not JSON"),
        ("{}", "holds no tools; write a list of JSON schemas"),
        ('{"functions": []}', "holds no tools"),
        ("[1]", r"tools\[0\] names no function"),
        ('[{"type": "function"}]', r"tools\[0\] names no function"),
    ],
)
def test_a_file_without_tools_is_refused(rigged, chat, tmp_path, content, expected):
    import re

    (file := tmp_path / "tools.json").write_text(content)
    _, script = chat([rigged("a")], [f"/tools {file}"])
    assert re.search(expected, last(script)) and str(file) in last(script)


def test_words_that_look_like_commands(rigged, chat):
    speaker = rigged("a")
    _, script = chat([speaker], ["/hlep", "/usr/bin is what?", " /help", "", "/tools nowhere.json", "/save 'a b"])
    assert "/hlep is not a command; /help lists them, and a blank before it makes it a message" in script.notes
    assert len(script.said) == 2 and "/usr/bin is what?" in speaker.model.prompts[0]
    assert any("nowhere.json cannot be read (No such file or directory)" in note for note in script.notes)
    assert any("put quotes around a name with blanks" in note for note in script.notes)


def test_a_file_that_is_named_again_gets_no_second_row(rigged, chat, tmp_path):
    file, other = tmp_path / "chats.jsonl", tmp_path / "other.jsonl"
    _, script = chat([rigged("a")], ["one", f"/save {file}", f"/save {file}", "two", f"/save {other}", "three"])
    assert f"1 row is in {file}; it is written again after each reply that ends by itself" in script.notes
    assert [len(json.loads(line)["messages"]) for line in file.read_text().splitlines()] == [4]
    assert [len(json.loads(line)["messages"]) for line in other.read_text().splitlines()] == [6]


def test_unfold_shows_the_thinking_of_each_model(rigged, chat):
    one, two = rigged("<think>\nmine\n</think>\n1", "sft"), rigged("2", "apo")
    session, script = chat([one, two], ["/unfold", "x", "/unfold"])
    assert last(script) == "sft:\nmine" and session.view.unfolded
    assert "thinking stays open from now on; /fold folds it again" in script.notes


def test_a_call_cannot_write_into_the_terminal(rigged, chat):
    reply = '<tool_call>{"name": "f", "arguments": {"a": "\x1b[2J' + "b" * 99 + '"}}</tool_call>'
    _, script = chat([rigged(reply)], ["x"], tools=Tools(xml=("f(a)",)), thinking=False)
    [prompt] = [note for note in script.notes if note.startswith("result of f(a=")]
    assert "\x1b" not in prompt and len(prompt) < 80
    assert "\x1b" not in "".join(script.said[0][2])


def test_replies_under_another_system_message_are_context_of_the_row(rigged, chat, tmp_path):
    file = tmp_path / "chats.jsonl"
    chat([rigged("a")], ["one", "/system Be brief.", "two", "/system Shout."], save=file)
    [row] = map(json.loads, file.read_text().splitlines())
    assert [(m["content"], m.get("train")) for m in row["messages"]] == [
        ("Be brief.", None), ("one", None), ("a", False), ("two", None), ("a", None),
    ]  # fmt: skip
