"""The terminal view says the same with colours and without, and lets no text steer the terminal."""

import io
import re

import prepared_folders as made
import pytest
from rich.console import Console

from smolpost.chat.fates import Fate
from smolpost.report.fate_names import NAMES
from smolpost.report.inspect import Prepared
from smolpost.report.terminal import show, visible
from tests.report.prepared_folders import HOSTILE

LINE = re.compile(r"^ *([\d,]+)  (\w+) +(?: |$)(.*)$")


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal") / "sft"
    made.write_sft(folder)
    return Prepared(folder)


@pytest.fixture(scope="module")
def apo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal") / "apo"
    made.write_apo(folder)
    return Prepared(folder)


def printed(prepared, *, colour=False, width=160, **asked) -> str:
    file = io.StringIO()
    options = {"color_system": "truecolor", "force_terminal": True} if colour else {"color_system": None}
    show(prepared, Console(file=file, width=width, **options), **asked)
    return file.getvalue()


def body(text: str) -> str:
    return text[text.index("══") :]


def test_colours_change_no_letter(sft, apo):
    for prepared in (sft, apo):
        plain, coloured = (printed(prepared, colour=colour, limit=3) for colour in (False, True))
        assert "\x1b" not in plain
        assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
        assert coloured.count("\x1b[") > 100


def test_no_color_is_kept(sft, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    show(sft, Console(file=file, width=160, force_terminal=True), limit=1)
    assert not re.search(r"\x1b\[[\d;]*(38|48);", file.getvalue())
    assert "\x1b[4mIt is 4." in file.getvalue()  # trained text stays underlined
    assert "\x1b[4mWhat is" not in file.getvalue()


@pytest.mark.parametrize("width", [60, 160])
def test_every_run_with_its_position_word_and_text(sft, width):
    """The whole view, read back: what stands beside each fate's word is the text of its tokens."""
    text, margin = body(printed(sft, limit=3, width=width)), 21
    runs = []
    for line in text.splitlines():
        if match := re.match(r"^ {0,7}([\d,]+)  (\w+) +", line[:margin]):
            runs.append([match[1], match[2], line[margin:]])
        elif line.startswith(" " * margin):
            runs[-1][2] += line[margin:]
    expected = []
    for i in range(len(sft)):
        for document in sft.pack(i).documents:
            texts = sft.texts(document.tokens.ids)
            for fate, start, stop in document.tokens.runs():
                joined = visible("".join(texts[start:stop])).replace("\n", "")
                expected.append([str(start), NAMES[fate].word, joined])
    assert runs == expected
    assert {run[1] for run in runs} == {name.word for name in NAMES.values()}


def test_the_legend_counts_what_is_shown(sft, apo):
    for prepared, asked, kept in [
        (sft, {"limit": 3}, [d.tokens.fates for i in range(3) for d in sft.pack(i).documents]),
        (sft, {"pack": 1}, [d.tokens.fates for d in sft.pack(1).documents]),
        (apo, {"limit": 2}, [part.fates for i in range(2) for part in apo.pair(i).parts]),
    ]:
        text = printed(prepared, **asked)
        for fate, name in NAMES.items():
            count = sum(int((fates == fate).sum()) for fates in kept)
            assert re.search(rf"^ +{count} +{name.word} +{re.escape(name.why)}$", text, re.MULTILINE), (fate, count)


def test_borders_and_restarts(sft):
    text = body(printed(sft, limit=3))
    assert [int(i) for i in re.findall(r"^══ pack (\d+) ═", text, re.MULTILINE)] == [0, 1, 2]
    assert re.findall(r"^── document (\d+) ", text, re.MULTILINE) == list("010012")
    assert len(re.findall(r"^ {7}0  first ", text, re.MULTILINE)) == 6  # every document begins at position 0
    assert "tokens 64 to 169 of pack 0" in text
    assert "shown 3 of 3 packs" in text


def test_rows_that_were_asked_for(sft):
    text = printed(sft, row="2", limit=5)
    assert re.findall(r"^── document (\d) +(\w+) +([\w./]+):(\d)", text, re.MULTILINE) == [
        ("2", "tools", "data/tools.jsonl", "2")
    ]
    assert "dropped: data/everyday.jsonl:2 overlong" in text
    assert text.rstrip().endswith("shown 1 of 1 documents")
    assert printed(sft, source="everyday", limit=2).rstrip().endswith("shown 2 of 3 documents")


def test_pairs(apo):
    text = body(printed(apo, limit=2))
    assert re.findall(r"^── (\w+) +(\d+) tokens(, shared by both sides)?, (\d+) scored", text, re.MULTILINE)[:3] == [
        (part.name, str(len(part.ids)), ", shared by both sides" * (part.name == "prompt"), scored(part))
        for part in apo.pair(0).parts
    ]


def scored(part) -> str:
    return str(int((part.fates == Fate.TRAINED).sum()))


def test_hostile_text_steers_nothing(sft):
    text = printed(sft, pack=1)
    assert "\x1b" not in text and "\u202e" not in text and "\x00" not in text
    assert visible(HOSTILE) in text  # and rich's markup was not read either


def test_visible():
    assert visible("a\n  b \t\n") == "a↵\n␣␣b ⇥↵\n"
    assert visible("   ") == "␣␣␣" and visible("a b") == "a b"
    assert visible("\r\u202e\u200b\u2028") == "⟨U+000D⟩⟨U+202E⟩⟨U+200B⟩⟨U+2028⟩"
    assert visible("👩\u200d🚀 é") == "👩\u200d🚀 é"
