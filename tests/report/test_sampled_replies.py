"""What is called wrong with a reply, and the counts by model and mode."""

import io

import pytest
from rich.console import Console

from smolpost.report import replies
from smolpost.report.replies import Column, Given, Prompt, facts, facts_table, hints, shown_replies
from smolpost.synthesis.records import Reply

LONG_QUESTION = "Could you please tell me how I can keep my bread fresh for a whole week without a freezer?"
GERMAN = "Das Brot bleibt am besten in einem sauberen Tuch in einem Topf aus Ton, der nicht ganz geschlossen ist."
ENGLISH = "Keep the bread in a clean cloth inside a pot of clay, and leave the lid a little open to let it breathe."


def reply(content="Fine.", reasoning=None, finish="stop", tokens=10, **more) -> Reply:
    return Reply(content, reasoning, finish, completion_tokens=tokens, **more)


@pytest.mark.parametrize(
    ("given", "mode", "found"),
    [
        (reply(reasoning="It is."), "think", ()),
        (reply(), "think", ("no think",)),
        (reply(), "no_think", ()),
        (reply(), "one", ()),
        (reply(reasoning="It is."), "no_think", ("thinks",)),
        (reply(reasoning=""), "no_think", ()),  # an empty block is what the mode asks for
        (reply(finish="length"), "no_think", ("cut",)),
        (reply("", "It", "length", closed=False), "think", ("cut", "open think", "empty")),
        (reply("", "It", closed=False), "think", ("open think", "empty")),
        (reply(" \n"), "no_think", ("empty",)),
        (reply("", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]), "no_think", ()),
        (reply("Yes, it is so. " * 30), "no_think", ("repeats",)),
        (reply(reasoning="I have to repeat it. " * 30), "think", ("repeats",)),
        (reply(" ".join(f"word{i}" for i in range(200))), "no_think", ()),
    ],
)
def test_hints(given, mode, found):
    assert hints(given, mode, "Is it?") == found


def test_another_language_is_a_hint_where_it_can_be_detected(monkeypatch):
    pytest.importorskip("lingua")
    assert hints(reply(GERMAN), "no_think", LONG_QUESTION) == ("language",)
    assert hints(reply(ENGLISH), "no_think", LONG_QUESTION) == ()
    assert hints(reply(GERMAN), "plain", LONG_QUESTION) == ()
    monkeypatch.setattr(replies, "knows_languages", lambda: False)
    assert hints(reply(GERMAN), "no_think", LONG_QUESTION) == ()
    assert "language" not in replies.known_hints()


PROMPTS = [Prompt("a", [{"role": "user", "content": "Is it?"}]), Prompt("b", [{"role": "user", "content": "And?"}])]
COLUMNS = [
    Column("sft", "", {
        (0, "think", 0): Given(reply(reasoning="It is.", tokens=10), None),
        (1, "think", 0): Given(reply("", "It", "length", tokens=40, closed=False), None),
        (0, "no_think", 0): Given(reply(tokens=None), None),
        (1, "no_think", 0): Given(None, "the template refuses it"),
    }),
    Column("base", "", {(i, "plain", 0): Given(reply(tokens=4), None) for i in range(2)}),
]  # fmt: skip


def test_counts_by_model_and_mode():
    shown = shown_replies(COLUMNS, PROMPTS)
    assert [(one.model, one.mode) for one in shown[1]] == [("sft", "think"), ("sft", "no_think"), ("base", "plain")]
    heads, rows = facts([one for found in shown.values() for one in found])
    assert heads == ["model", "mode", "replies", "failed", "mean tokens", "cut", "open think", "empty"]
    assert rows == [
        ["sft", "think", "2", "0", "25", "1", "1", "1"],
        ["sft", "no think", "1", "1", "-", "0", "0", "0"],
        ["base", "plain text", "2", "0", "4", "0", "0", "0"],
    ]


def test_the_table_fits_80_columns_and_shows_what_steers_a_terminal():
    hostile = [Column("a\x1b[31m" + "x" * 60, "", COLUMNS[0].replies), *COLUMNS]
    screen = io.StringIO()
    shown = shown_replies(hostile, PROMPTS)
    Console(file=screen, width=80).print(facts_table(one for found in shown.values() for one in found))
    assert max(map(len, screen.getvalue().splitlines())) <= 80 and "\x1b" not in screen.getvalue()
