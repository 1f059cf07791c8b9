"""What is chosen and shown of a stage of synthetic data, and of a preview."""

import io
import json
import re

import pytest
from rich.console import Console

from smolpost.cli import main
from smolpost.errors import UserError
from smolpost.files import MANIFEST, hashes, write_json
from smolpost.report.preview import RoleRun, show_preview
from smolpost.report.samples import Samples, Turn, shown
from smolpost.report.show_samples import show_samples
from smolpost.synthesis import results, row_table
from smolpost.synthesis.records import Record, Sample
from smolpost.synthesis.status import Prices
from tests.synthesis.outcomes import FACTS, THOUGHT, accepted, failed, filtered, pair, reply, turns

OUTCOMES = [
    accepted("a1"), accepted("a2"), accepted("a3", "code"), filtered("f1"), accepted("a4"), failed("x1"),
    filtered("f2", "wrong", "code"), accepted("a5"), filtered("f3"), failed("x2", "HTTP 400", "code"),
]  # fmt: skip


def stage(folder, outcomes):
    folder.mkdir()
    results.write(folder, outcomes, facts=FACTS, max_failed=1, num_prompts=len(outcomes))
    write_json(folder / MANIFEST, {"key": "k", "files": hashes(folder)})
    return folder


def printed(width: int, act, *arguments, **settings) -> str:
    screen = io.StringIO()
    act(*arguments, Console(file=screen, width=width, markup=False, emoji=False, highlight=False), **settings)
    return screen.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(row_table, "BATCH_ROWS", 2)
    monkeypatch.setattr(row_table, "GROUP_BYTES", 1)  # several row groups
    return stage(tmp_path / "stage", OUTCOMES)


def test_everything_is_found_again(folder):
    found, total = Samples(folder).choose(100)
    assert total == 10
    assert [(one.id, one.source, one.status, one.reason, one.error) for one in found] == [
        (
            o.prompt.id,
            o.prompt.source,
            "failed" if o.error else "filtered" if o.reason else "accepted",
            o.reason,
            o.error,
        )
        for o in OUTCOMES
    ]
    for one, outcome in zip(found, OUTCOMES, strict=True):
        assert one.prompt == [Turn("user", None, "2 + 2?", ())]
        # What is read back shows the same as the outcome at hand.
        at_hand = shown(outcome)
        assert (one.sides, one.verdicts, one.tokens) == (at_hand.sides, at_hand.verdicts, at_hand.tokens)
    assert found[0].sides == {"reply": [Turn("assistant", "Two and two.", "4", ())]}
    assert found[3].sides == {"teacher": [Turn("assistant", "On and", "", ())]}
    assert found[5].sides == {} and found[5].tokens == {}
    assert found[0].tokens == {"teacher": 5}


def test_each_way_to_end_is_among_the_chosen(folder):
    found, total = Samples(folder).choose(4)
    assert total == 10 and {one.reason or one.status for one in found} == {"accepted", "cut", "wrong", "failed"}
    found, total = Samples(folder).choose(6)
    assert [one.id for one in found] == ["a1", "a2", "f1", "x1", "f2", "f3"]  # in the order of the prompts
    found, total = Samples(folder).choose(10, source="code")
    assert total == 3 and [one.id for one in found] == ["a3", "f2", "x2"]
    found, total = Samples(folder).choose(10, identity="a4")
    assert total == 1 and found[0].id == "a4"
    with pytest.raises(UserError, match=r"source 'poems' is not in .*; its sources are maths, code"):
        Samples(folder).choose(10, source="poems")
    with pytest.raises(UserError, match="id 'zz' is not in"):
        Samples(folder).choose(10, identity="zz")


def test_pairs_share_their_prompt():
    one = shown(pair("p", sides=(THOUGHT, "5")))
    assert one.prompt == [Turn("user", None, "2 + 2?", ())]
    assert one.sides == {
        "chosen": [Turn("assistant", "Two and two.", "4", ())], "rejected": [Turn("assistant", None, "5", ())],
    }  # fmt: skip
    assert one.tokens == {"chosen": 5, "rejected": 5}
    same = shown(pair("p", sides=("5", "5")))
    assert [list(map(len, same.sides.values())), len(same.prompt)] == [[1, 1], 1]


def test_samples_and_calls_are_told_apart():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        *turns("Add.", "")[:1], {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": "One."},
    ]  # fmt: skip
    outcome = filtered("f")
    samples = [Sample(messages, [reply("One.")]), Sample(turns("Add.", "Two."), [reply("Two.")])]
    one = shown(outcome._replace(records={"teacher": Record("f", "maths", samples)}))
    assert list(one.sides) == ["teacher 1", "teacher 2"]
    assert one.sides["teacher 1"][0] == Turn("assistant", None, "", ('add({"a": 1})',))
    assert one.sides["teacher 2"] == [Turn("assistant", None, "Two.", ())]


def test_terminal(folder):
    text = printed(100, show_samples, Samples(folder), limit=4)
    assert re.search(r"maths +7 +4 +57\.1% +2 +0 +1\n", text) and re.search(r"all +10 +5 +50\.0% +2 +1 +2\n", text)
    assert "══ f1  maths  filtered: cut\nuser: 2 + 2?\n── teacher\nthink: On and\n" in text
    assert "filters: finished FAULT cut, repetition ok 0.5" in text
    assert "══ x1  maths  failed: HTTP 500" in text
    assert text.endswith("shown 4 of 10 prompts; --html FILE shows whole texts\n")


@pytest.mark.parametrize(("width", "beside"), [(100, True), (60, False)])
def test_sides_stand_side_by_side_where_there_is_room(tmp_path, width, beside):
    samples = Samples(stage(tmp_path / "pairs", [pair("p")]))
    text = printed(width, show_samples, samples)
    assert bool(re.search("think: Two and two. +5 *\n", text)) == beside
    assert "tokens: chosen 5, rejected 5\nfilters: margin ok 1.5\n" in text


def test_terminal_is_not_steered(tmp_path):
    text = "\x1b[31mred \u202eleft\r" + "x" * 5000
    samples = Samples(stage(tmp_path / "s", [accepted("a\x1b[2J", answer=text)]))
    shown_text = printed(80, show_samples, samples)
    assert "\x1b" not in shown_text and "\u202e" not in shown_text and "\r" not in shown_text
    assert "⟨U+001B⟩[31mred ⟨U+202E⟩left⟨U+000D⟩x" in " ".join(shown_text.split()) and "more characters" in shown_text


def test_inspect_knows_what_a_folder_holds(folder, tmp_path, capsys):
    def inspect(*words, code=0):
        with pytest.raises(SystemExit) as end:
            main(["inspect", str(folder), *words])
        assert end.value.code == code
        return "".join(capsys.readouterr())

    assert "shown 5 of 10 prompts" in inspect()
    assert "shown 1 of 1 prompt;" in inspect("--row", "a3")
    page = tmp_path / "page.html"
    assert f"{page}: " in inspect("--html", str(page)) and "<article" in page.read_text()
    assert "--pack is for prepared rows" in inspect("--pack", "1", code=2)
    (tmp_path / "mine.html").write_text("mine")
    assert "is not a page of `smolpost inspect`" in inspect("--html", str(tmp_path / "mine.html"), code=2)


# ---------------------------------------------------------------- preview


def asked(identity: str, tokens_in: int, tokens_out: int, kept: bool = True):
    outcome = accepted(identity) if kept else filtered(identity)
    sample = Sample(turns("2 + 2?", "4"), [reply("4", prompt_tokens=tokens_in, completion_tokens=tokens_out)])
    return outcome._replace(records={"teacher": Record(identity, "maths", [sample])})


def test_preview_extrapolates_with_its_spread():
    outcomes = [asked(str(i), 100, 1000 + 200 * i, kept=i != 3) for i in range(4)]  # 1000 to 1600: mean 1300
    runs = {"teacher": RoleRun(8.0, 16, Prices(1.0, 10.0))}
    text = printed(120, show_preview, outcomes, num_prompts=4000, runs=runs)
    assert "══ 0  maths  accepted" in text and "══ 3  maths  filtered: cut" in text
    assert "preview of 4 of 4,000 prompts: 3 accepted, 1 cut; nothing is kept" in text
    # Standard deviation 258.2, of the mean of four 129.1, twice that times 4,000: 1.03M. 8 s for 4 prompts: 8,000 s
    # for all of them at 4 requests at once, 2,000 s at 16. Costs 4,000 x (100 + 10 x 1,300) / 10^6.
    assert re.search(r"teacher +400k ± 0 +5\.2M ± 1\.03M +33 min to 2 h 13 min +52\.40\n", text)
    # Wilson's interval of 3 in 4 with z = 2: (0.75 + 0.5) / 2 -+ sqrt(4 (0.046875 + 0.0625)) / 2 = 0.294 and 0.956.
    assert "rows: about 3,000, by this sample 1,177 to 3,823\n" in text


def test_preview_says_what_it_does_not_know():
    outcomes = [asked("1", None, None), failed("2")]
    runs = {"teacher": RoleRun(2.0, 1, Prices())}
    text = printed(120, show_preview, outcomes, num_prompts=10, runs=runs)
    assert re.search(r"teacher +not counted +not counted +10 s +no prices set\n", text)
    assert "1 accepted, 1 failed" in text
    one = printed(120, show_preview, [asked("1", 5, 7)], num_prompts=10, runs=runs)
    assert "50 ± ?" in one and "70 ± ?" in one


def test_preview_of_prompts_that_become_several_rows():
    parts = [asked("1", 10, 20), asked("1", 10, 40), asked("2", 10, 30), asked("2", 10, 30, kept=False)]
    outcomes = [o._replace(prompt=o.prompt._replace(id=f"{o.prompt.id}-{i}")) for i, o in enumerate(parts)]
    runs = {"teacher": RoleRun(4.0, 2, Prices())}
    text = printed(120, show_preview, outcomes, num_prompts=100, runs=runs)
    assert "preview of 2 of 100 prompts: 3 accepted, 1 cut" in text
    assert re.search(r"teacher +2k ± 0 +6k ± 0 +3 min ", text)  # 20 and 60 tokens a prompt
    assert "rows: about 150, by this sample " in text  # of 200


def test_failed_lines_hold_the_row(folder):
    lines = [json.loads(line) for line in (folder / results.FAILED_ROWS).read_text().splitlines()]
    assert [line["row"]["messages"][0]["content"] for line in lines] == ["2 + 2?", "2 + 2?"]
