"""What a terminal shows: folded and open thinking, columns, no control characters of a reply."""

import io

import pytest
from rich.console import Console

from smolpost.talk.conversation import STOP, Said
from smolpost.talk.splitter import ANSWER, THINKING
from smolpost.talk.view import Plain, Terminal, clean, foot_lines


class Counts:
    thinking_tokens, thinking_seconds = 4, 2.06


def said(answer="The answer.", reasoning="", tokens=0):
    message = {"role": "assistant", "content": answer}
    return Said(message, reasoning, answer, STOP, True, "", 8, tokens, 2.0, 2.06, 3)


@pytest.fixture
def terminal():
    """Return a function: width -> Terminal that writes to a StringIO, without colours."""

    def make(width=80):
        console = Console(width=width, height=20, file=io.StringIO(), force_terminal=True, color_system=None)
        return Terminal(console)

    return make


def shown(view, names, *replies):
    """What is left on the screen: (pieces, said) of each reply."""
    with view.turn(names) as turn:
        for place, (pieces, whole) in enumerate(replies):
            for kind, text in pieces:
                turn.show(place, kind, text, Counts)
            turn.end(place, whole, foot_lines(whole, []))
    return view.console.file.getvalue()


def test_thinking_folds_to_a_line_before_the_answer(terminal):
    text = shown(terminal(), ["sft"], ([(THINKING, "\nhm\n"), (ANSWER, "The "), (ANSWER, "answer.")], said(tokens=4)))
    after = text[text.index("thought for 4 tokens") :]
    assert after == "thought for 4 tokens, 2.1 s; /unfold shows it\nThe answer.\n8 tokens, 4.0 tokens/s, seed 3\n"


def test_open_thinking_stays(terminal):
    view = terminal()
    view.unfolded = True
    text = shown(view, ["sft"], ([(THINKING, "\n"), (THINKING, "hm\n"), (ANSWER, "The answer.")], said(tokens=4)))
    assert text == "hm\n\nThe answer.\n8 tokens, 4.0 tokens/s, seed 3\n"


def test_an_answer_that_was_taken_for_thinking_is_shown_in_the_end(terminal):
    text = shown(terminal(), ["sft"], ([(THINKING, "all of it")], said("of it", "all", 4)))
    assert text.endswith("; /unfold shows it\n\n\nof it\n8 tokens, 4.0 tokens/s, seed 3\n")


@pytest.mark.parametrize("width", [100, 99])
def test_two_replies_stand_side_by_side_where_there_is_room(terminal, width):
    replies = [([(ANSWER, answer)], said(answer)) for answer in ("one " * 30, "two " * 30)]
    lines = shown(terminal(width), ["sft", "apo"], *replies).splitlines()
    both = [line for line in lines if "one" in line and "two" in line]
    assert bool(both) is (width == 100)
    if both:
        assert lines[-1].split("   ")[0].strip() == "8 tokens, 4.0 tokens/s, seed 3"
        assert all(len(line.rstrip()) <= 100 for line in lines[-5:])


def test_a_long_reply_is_complete_in_its_column(terminal):
    answer = "\n".join(map(str, range(60)))
    text = shown(
        terminal(100), ["sft", "apo"], ([(ANSWER, answer)], said(answer)), ([(ANSWER, "short")], said("short"))
    )
    column = [line.split()[0] for line in text.splitlines()[-61:-1]]
    assert column == list(map(str, range(60)))


def test_a_reply_cannot_steer_the_terminal():
    assert clean("a\x1b]0;title\x07b\r\nc\td\x9b") == "a\ufffd]0;title\ufffdb\nc\td\ufffd"


def test_a_pipe_gets_answers_and_stderr_the_rest(capsys):
    view = Plain()
    with view.turn(["sft"]) as turn:
        turn.end(0, said("one\ntwo", "hm"), ["a note", "the speed"])
    assert capsys.readouterr() == ("one\ntwo\n", "a note\n")
