"""Each filter of a reply names its fault: how it ended, where it thinks, its length, repetitions, its language."""

import pytest

from smolpost.chat.reasoning import CLOSE
from smolpost.synthesis.filters.form import finished, length, not_empty, readable_calls, think_format, tokens_of
from smolpost.synthesis.filters.language import in_language, same_language
from smolpost.synthesis.filters.repetition import ends_in_loop, repeated_share, repetition
from smolpost.synthesis.records import Reply, Verdict

ENGLISH = "The dog runs through the garden and looks for its ball while the cat is sleeping on the wall."
GERMAN = "Der Hund läuft durch den Garten und sucht nach seinem Ball, während die Katze auf der Mauer schläft."
FRENCH = "Le chien court dans le jardin et cherche sa balle pendant que le chat dort sur le mur."
PASSED = Verdict(True)


def reply(content="4", reasoning=None, finish_reason="stop", **changes):
    return Reply(content, reasoning, finish_reason, **changes)


# ---------------------------------------------------------------- form


@pytest.mark.parametrize(
    ("finish_reason", "fault"),
    [
        ("stop", ""),
        ("tool_calls", ""),
        ("length", "cut"),
        ("content_filter", "content_filter"),
        ("abort", "unfinished"),
        ("", "unfinished"),
    ],
)
def test_a_reply_has_to_end_by_itself(finish_reason, fault):
    assert finished(reply(finish_reason=finish_reason)) == Verdict(not fault, fault)


def test_a_refusal_in_the_servers_own_field_is_a_fault_and_words_of_refusal_are_not():
    assert finished(reply(raw={"refusal": "I will not."})).reason == "refused"
    assert finished(reply("I cannot help with that.", raw={"refusal": None})).passed


def test_a_reply_without_answer_is_empty_unless_it_calls_a_tool():
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert [not_empty(reply(text)).reason for text in ("", " \n", None, "4")] == ["empty", "empty", "empty", ""]
    assert not_empty(reply("", tool_calls=[call])).passed


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        ({"name": "add", "arguments": '{"a": 1}'}, ""),
        ({"name": "add", "arguments": {"a": 1}}, ""),
        ({"name": "add", "arguments": '{"a": 1'}, "malformed_call"),
        ({"name": "add", "arguments": "[1]"}, "malformed_call"),
        ({"name": "add"}, "malformed_call"),
        ({"name": None, "arguments": "{}"}, "malformed_call"),
        (None, "malformed_call"),
        ({"name": "subtract", "arguments": "{}"}, "unknown_function"),
    ],
)
def test_calls_of_tools_can_be_read_in_training(function, fault):
    schema = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    for tools in ([{"type": "function", "function": schema}], [schema]):
        assert readable_calls(reply("", tool_calls=[{"function": function}]), tools) == Verdict(not fault, fault)
    assert readable_calls(reply("", tool_calls=["add"]), None).reason == "malformed_call"
    assert readable_calls(reply("4"), tools).passed


@pytest.mark.parametrize(
    ("asked", "reasoning", "content", "fault"),
    [
        (True, "2 + 2 = 4", "4", ""),
        (True, None, "4", "no_thinking"),
        (True, "", "4", "no_thinking"),
        (True, " \n", "4", "no_thinking"),
        (False, None, "4", ""),
        (False, "\n\n", "4", ""),  # the empty block of no-think mode
        (False, "2 + 2", "4", "unasked_thinking"),
        (None, "2 + 2", "4", ""),
        (None, None, "4", ""),
        (True, "first", "<think>\nsecond\n</think>\n4", "think_tags"),
        (False, None, "<think>\nhm\n</think>\n4", "think_tags"),
        (None, None, "hm\n</think>\n4", "think_tags"),  # a block whose opening the server took away
        (True, "I close with\n</think>\nnow", "4", "think_tags"),
        (True, "The tag </think> ends a block.\nGood.", "It is `</think>`.", ""),  # words, not structure
        (False, None, "Models write <think> first.", ""),
    ],
)
def test_thinking_is_one_block_where_it_was_asked_for_and_none_where_not(asked, reasoning, content, fault):
    assert think_format(reply(content, reasoning), asked) == Verdict(not fault, fault)


@pytest.mark.parametrize("asked", [True, False, None])
def test_a_think_block_has_to_close(asked):
    assert think_format(reply("", "2 +", closed=False), asked).reason == "unclosed_thinking"


def test_lengths_are_the_servers_counts_and_a_quarter_of_the_bytes_without_them():
    assert tokens_of(reply("x" * 400, completion_tokens=7)) == 7
    assert tokens_of(reply("x" * 9)) == 3
    assert tokens_of(reply("é" * 4, "x" * 8)) == 4  # 8 bytes each
    assert tokens_of(reply("\ud800")) == 1
    counted = [length(reply(completion_tokens=n), 3, 5) for n in (2, 3, 5, 6)]
    assert counted == [
        Verdict(False, "too_short", 2), Verdict(True, "", 3), Verdict(True, "", 5), Verdict(False, "too_long", 6),
    ]  # fmt: skip
    assert length(reply(completion_tokens=0), None, 5).passed and length(reply(completion_tokens=9), 1, None).passed


# ---------------------------------------------------------------- repetition


def test_the_share_is_that_of_8_grams_that_occurred_before():
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]  # two 8-grams
    assert repeated_share(" ".join(words)) == 0
    assert repeated_share(" ".join(words * 2)) == 1 - 9 / 11  # 18 words, 11 8-grams, 9 different ones
    assert repeated_share("word " * 108) == 1 - 1 / 101
    assert repeated_share("seven words do not make a gram") == repeated_share("") == 0


def test_repetition_reads_reasoning_and_answer_and_the_limit_itself_passes():
    words = "one two three four five six seven eight nine"
    share = 1 - 9 / 11
    assert repetition(reply(words, words), share) == Verdict(True, "", share)
    assert repetition(reply(words, words), share - 0.01) == Verdict(False, "repetition", share)
    assert repetition(reply(None), 0.5) == Verdict(True, "", 0.0)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        (ENGLISH + " Wait, no. " * 20, True),
        (ENGLISH + " Wait, no." * 21 + " Wait,", True),  # cut inside a period
        ("哈哈等等" * 60, True),
        ("我们再检查一遍这个答案是否正确。" * 13, True),
        ("แล้วก็" * 40, True),
        ("10" * 150, True),
        (("abc " * 30 + "xyz " * 30) * 5, True),  # its last characters recur inside its period, too
        (ENGLISH + " Wait, no. " * 10, False),  # 110 characters
        ("-" * 300, False),
        ("| | | |\n" * 60, False),
        (ENGLISH + GERMAN + FRENCH, False),
        ((ENGLISH + GERMAN + FRENCH) * 3, False),  # three times
        ("", False),
        ("a", False),
    ],
)
def test_a_loop_at_the_end_is_found_in_any_script(text, loops):
    assert ends_in_loop(text) == loops
    assert (repetition(reply("4", text), 1.0).reason == "loop") == loops


# ---------------------------------------------------------------- language


@pytest.mark.parametrize(
    ("question", "answer", "fault"),
    [
        (GERMAN, GERMAN, ""),
        (GERMAN, ENGLISH, "language"),
        (FRENCH, ENGLISH, "language"),
        (GERMAN, "It is four.", ""),  # too short to tell
        ("Was ist 2 + 2?", ENGLISH, ""),
        (ENGLISH, f"{ENGLISH}\n```python\n{GERMAN * 5}\n```", ""),  # code
        (ENGLISH, f"$$\\text{{{GERMAN}}}$$ {ENGLISH}", ""),
        (ENGLISH, f"```\n{GERMAN}", ""),  # a fence that never closes
        ("", ENGLISH, ""),
        (GERMAN, f"{GERMAN} {ENGLISH * 20}", "language"),  # a reply that goes on in another language
        (ENGLISH, f"{ENGLISH * 20} {GERMAN * 3}", "language"),
        (f"{ENGLISH * 3}\n{GERMAN * 10}", ENGLISH, ""),  # a question about a text in another language
        (f"{ENGLISH * 3}\n{GERMAN * 10}", GERMAN, ""),
        (f"{ENGLISH * 3}\n{GERMAN * 10}", FRENCH, "language"),
    ],
)
def test_the_answer_is_in_the_language_of_the_question(question, answer, fault):
    pytest.importorskip("lingua")
    assert same_language(question, answer, 0.5).reason == fault


def test_an_uncertain_language_stays_and_a_stated_one_is_compared():
    pytest.importorskip("lingua")
    verdict = same_language(GERMAN, ENGLISH, 0.5)
    assert verdict.score > 0.8
    # The detector is never this certain of a text that is half and half.
    assert same_language(GERMAN, f"{ENGLISH} {FRENCH}", 1.0).passed
    assert in_language(FRENCH, "fr", 0.5).passed and in_language(FRENCH, "it", 0.5).reason == "language"


def test_tags_of_reasoning_are_the_librarys():
    assert think_format(reply(f"4\n{CLOSE}\n", "x"), True).passed  # after the block they are words
