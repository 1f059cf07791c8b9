"""All filters together: their order, what each of them reads, odd replies, and their speed."""

import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from smolpost.errors import UserError
from smolpost.synthesis.filters import check_filters, first_fault, judge_reply, judge_sample
from smolpost.synthesis.filters.shared import EarlierReplies, without_near_duplicates
from smolpost.synthesis.records import Outcome, Prompt, Reply, Sample, Verdict
from smolpost.synthesis.settings import Filters

PASSED = Verdict(True)
TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
ALL = dict(answer="keep", max_repetition=0.5, min_tokens=1, max_tokens=100)


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def prompt(*texts):
    return Prompt("p", "sums", {"messages": turns(*texts), "source": "sums"})


def sample(*texts, reasoning=None, finish_reason="stop", completion_tokens=9, **changes):
    """A conversation whose assistant turns are all replies."""
    replies = [
        Reply(text, reasoning, finish_reason, completion_tokens=completion_tokens, **changes) for text in texts[1::2]
    ]
    return Sample(turns(*texts), replies)


def judged(found, settings, row=None, thinking=None, **options):
    return judge_sample(found, row or prompt("2+2?", "4"), settings, thinking=thinking, **options)


# ---------------------------------------------------------------- together


def test_filters_that_are_off_say_nothing_and_the_others_come_in_one_order():
    assert list(judged(sample("2+2?", "4"), Filters(finished=False, think_format=False))) == ["empty"]
    assert list(judged(sample("2+2?", "4"), Filters())) == ["finished", "empty", "think_format"]
    names = ["finished", "empty", "think_format", "length", "repetition", "answer"]
    assert list(judged(sample("2+2?", "4"), Filters(**ALL))) == names
    cut = judged(sample("2+2?", "", finish_reason="length", completion_tokens=101), Filters(**ALL), thinking=True)
    assert [v.reason for v in cut.values()] == ["cut", "empty", "no_thinking", "too_long", "", "wrong_answer"]
    assert first_fault(cut) == "cut"


def test_a_label_is_noted_and_drops_nothing():
    verdicts = judged(sample("2+2?", "5"), Filters(answer="label"))
    assert verdicts["answer_label"] == Verdict(False, "wrong_answer", 0.0) and first_fault(verdicts) == ""
    assert first_fault(judged(sample("2+2?", "5"), Filters(answer="keep"))) == "wrong_answer"
    assert first_fault(judged(sample("2+2?", "5"), Filters(answer="keep"), row=prompt("2+2?"))) == "no_reference"


def test_every_reply_of_a_conversation_is_judged_and_only_the_last_one_has_a_reference():
    found = sample("1+1?", "2", "2+2?", "4")
    row = prompt("1+1?", "2", "2+2?", "4")
    assert first_fault(judged(found, Filters(answer="keep"), row)) == ""
    cut = found._replace(replies=[found.replies[0]._replace(finish_reason="length"), found.replies[1]])
    assert judged(cut, Filters(), row)["finished"].reason == "cut"
    longer = found._replace(replies=[found.replies[0], found.replies[1]._replace(completion_tokens=200)])
    assert judged(longer, Filters(max_tokens=100), row)["length"] == Verdict(False, "too_long", 200)


def test_each_reply_has_its_own_mode_where_modes_flip():
    found = sample("1+1?", "2", "2+2?", "4")
    thinks = [found.replies[0]._replace(reasoning="1 + 1"), found.replies[1]]
    assert judged(found._replace(replies=thinks), Filters(), thinking=[True, False])["think_format"] == PASSED
    assert judged(found._replace(replies=thinks), Filters(), thinking=[False, True])["think_format"].reason == (
        "unasked_thinking"
    )


def test_the_language_is_that_of_the_turn_before_the_reply_or_the_one_stated():
    pytest.importorskip("lingua")
    german = "Der Hund läuft durch den Garten und sucht nach seinem Ball, die Katze schläft auf der Mauer."
    english = "The dog runs through the garden and looks for its ball while the cat is sleeping on the wall."
    settings = Filters(language=True)
    assert judged(sample(german, german, english, english), settings)["language"].passed
    assert judged(sample(german, english, english, english), settings)["language"].reason == "language"
    reasoned = sample(german, german, reasoning=english)
    assert judged(reasoned, settings)["language"].passed  # reasoning may be in any language
    assert judged(sample(english, english), settings, language="de")["language"].reason == "language"


def test_replies_and_questions_of_evaluation_files_are_found(tmp_path):
    file = tmp_path / "eval.jsonl"
    file.write_text(json.dumps({"question": TEXT}) + "\n")
    settings = Filters(against=[str(file)])
    check_filters(settings, "f")
    for texts in ((TEXT, "4"), ("2+2?", f"It is {TEXT}!"), ("2+2?", f"<think>\n{TEXT}\n</think>\n4")):
        assert judged(sample(*texts), settings)["against"] == Verdict(False, "contaminated")
    assert judged(sample("2+2?", TEXT.rsplit(maxsplit=3)[0]), settings)["against"].passed  # 12 words
    assert judged(sample("2+2?", TEXT.rsplit(maxsplit=3)[0]), Filters(against=[str(file)], ngram=12))["against"].reason


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (dict(against=["none.jsonl"]), "s.against[0]=none.jsonl is not a file"),
        (dict(min_tokens=9, max_tokens=8), "s.min_tokens=9 is above max_tokens=8, so no reply would pass; lower"),
        (dict(near=1.5), "s.near=1.5 is outside [0, 1]"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_a_teacher_is_asked(settings, line):
    with pytest.raises(UserError) as error:
        check_filters(Filters(**settings), "s")
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "module"),
    [(dict(answer="label"), "math_verify"), (dict(language=True), "lingua"), (dict(near=0.8), "datasketch")],
)
def test_missing_packages_are_named(monkeypatch, settings, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=rf"^s\.\w+=\S+ needs {module}, which is not installed; pip install"):
        check_filters(Filters(**settings), "s")


# ---------------------------------------------------------------- near duplicates


def outcome(id, reply, *given, reason=""):
    row = {"messages": turns(*given, f"question {id}", reply)}
    asked = Prompt(id, "s", {"messages": turns(*given, f"question {id}", "reference")})
    return Outcome(asked, None if reason else row, reason)


def test_rows_that_nearly_equal_an_earlier_one_are_dropped_and_short_replies_stay():
    pytest.importorskip("datasketch")
    words = [f"w{i}" for i in range(100)]
    reply, near = " ".join(words), " ".join([*words[:-1], "other"])
    history = ("hello", " ".join(reversed(words)))
    outcomes = [
        outcome("dropped", reply, reason="cut"),  # what no row became of is not an earlier row
        outcome("a", reply), outcome("b", near), outcome("c", "Yes."), outcome("d", "Yes."),
        outcome("e", " ".join(words[::2]), *history), outcome("f", " ".join(words[1::2]), *history),  # equal histories
    ]  # fmt: skip
    found = list(without_near_duplicates(iter(outcomes), 0.8, "s"))
    assert [o.reason for o in found] == ["cut", "", "near_duplicate", "", "", "", ""]
    assert found[2].row is None and found[2].verdicts["near"].score > 0.9 and found[1].verdicts["near"] == PASSED
    assert found[0] is outcomes[0]
    with pytest.raises(UserError, match=r"s\.near=0 is outside \(0, 1\]"):
        EarlierReplies(0, "s")


def test_many_replies_take_little_memory():
    pytest.importorskip("datasketch")
    draw = random.Random(0)
    earlier = EarlierReplies(0.8, "s")
    for _ in range(2000):
        assert earlier.verdict(" ".join(draw.choices(TEXT.split(), k=40))).passed
    arrays = [earlier.index.signatures, earlier.index.heads, earlier.index.links]
    assert sum(array.nbytes for array in arrays) / 2048 <= 800


# ---------------------------------------------------------------- odd replies


ODD = st.one_of(
    st.none(),
    st.text(max_size=200),
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<think>\n</think>",
            "####",
            "\\boxed{",
            "$",
            "``` `",
            "\ud800",
            "\x00",
            "1" * 5000,
            "9^9^9",
        ]
    ),
)


@given(ODD, ODD, ODD, st.booleans(), st.sampled_from(["stop", "length", "tool_calls", "", "x"]), ODD)
@examples(max_examples=300, deadline=None)
def test_no_reply_is_too_odd_to_judge(question, content, reasoning, closed, finish_reason, reference):
    reply = Reply(content, reasoning, finish_reason, closed, tool_calls=None, raw={"refusal": None})
    found = Sample([{"role": "user", "content": question}, {"role": "assistant", "content": content}], [reply])
    verdicts = judge_reply(reply, found, prompt("2+2?", reference), Filters(**ALL), thinking=None)
    assert list(verdicts) == ["finished", "empty", "think_format", "length", "repetition", "answer"]
    assert all(verdict.passed == (not verdict.reason) for verdict in verdicts.values())


def test_calls_of_tools_need_no_text():
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    reply = Reply("", "2 + 2", "tool_calls", tool_calls=[call], completion_tokens=3)
    messages = [
        {"role": "user", "content": ["2", {"type": "text", "text": "+2?"}]},
        {"role": "assistant", "tool_calls": [call]},
    ]
    verdicts = judge_sample(Sample(messages, [reply]), prompt("2+2?"), Filters(), thinking=True)
    assert first_fault(verdicts) == "" and list(verdicts) == ["finished", "empty", "calls", "think_format"]


def test_words_in_calls_count_as_contamination_and_arguments_need_not_be_json(tmp_path):
    file = tmp_path / "eval.jsonl"
    file.write_text(json.dumps({"question": TEXT}) + "\n")
    for arguments, reason in ((json.dumps({"text": TEXT}), "contaminated"), ("{", "malformed_call")):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        reply = Reply("", None, "tool_calls", tool_calls=[call])
        messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        verdicts = judge_sample(Sample(messages, [reply]), prompt("2+2?"), Filters(against=[str(file)]), thinking=None)
        assert first_fault(verdicts) == reason


@pytest.mark.parametrize(
    "text", ["a", "word ", "<think>", "</think>\n", "$", "```", "`", "\\[", "\n", "哈", "{", " \t", "1,"]
)
def test_time_grows_with_the_length_of_a_reply(text):
    """A megabyte takes seconds at most; what grows with its square would take hours."""
    found = sample("2+2?", text * (2**20 // len(text)), reasoning=text * (2**20 // len(text)))
    start = time.perf_counter()
    judged(found, Filters(max_repetition=0.5, min_tokens=1), thinking=True)
    assert time.perf_counter() - start < 10


def test_a_hundred_thousand_short_replies_take_a_minute():
    """On one core, measured on a tenth of them."""
    draw = random.Random(0)
    words = TEXT.split()
    texts = [" ".join(draw.choices(words, k=60)) for _ in range(50)]
    found = [sample(texts[i], texts[-i], reasoning=texts[i - 1]) for i in range(50)]
    settings = Filters(max_repetition=0.5, min_tokens=1, max_tokens=1000)
    start = time.process_time()
    for i in range(10_000):
        judged(found[i % 50], settings, thinking=True)
    assert time.process_time() - start < 6
