"""Lengths of what became rows and what did not, counted in flat memory; warnings where length decides."""

import json
import random
import statistics
import tracemalloc

import pytest

from smolpost.synthesis.records import Outcome, Prompt, Record, Reply, Sample, Verdict
from smolpost.synthesis.tally import Spread, Tally, warnings


def record(*lengths, finish_reason="stop", texts=None):
    """A record with a sample of each length in tokens, and their texts or "reply LENGTH"."""
    samples = []
    for length, text in zip(lengths, texts or [f"reply {length}" for length in lengths], strict=True):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        samples.append(Sample(messages, [Reply(text, None, finish_reason, completion_tokens=length)]))
    return Record("p", "s", samples)


def traced(length, *, accepted, source="s", **changes):
    found = record(length, **changes)
    row = {"messages": found.samples[0].messages} if accepted else None
    return Outcome(Prompt("p", source, {}), row, "" if accepted else "cut", records={"teacher": found})


def paired(chosen, rejected):
    """A pair whose sides have so many bytes."""
    records = {"chosen": record(1, texts=["c" * chosen]), "rejected": record(1, texts=["r" * rejected])}
    row = {side: found.samples[0].messages for side, found in records.items()}
    return Outcome(Prompt("p", "s", {}), row, records=records)


def tallied(outcomes):
    tally = Tally()
    for outcome in outcomes:
        tally.add(outcome)
    report = tally.report()
    json.dumps(report, allow_nan=False)
    return report


def test_accepted_and_dropped_replies_are_counted_apart_and_by_source():
    report = tallied(
        [
            traced(100, accepted=True),
            traced(300, accepted=True, source="t"),
            traced(500, accepted=False, finish_reason="length"),
        ]
    )
    teacher = report["replies"]["teacher"]
    assert (teacher["accepted"]["count"], teacher["accepted"]["mean"]) == (2, 200)
    assert (teacher["dropped"]["count"], teacher["dropped"]["mean"], teacher["cut"]) == (1, 500, 1 / 3)
    of_t = report["sources"]["t"]["replies"]["teacher"]
    assert (of_t["accepted"]["mean"], of_t["dropped"], of_t["cut"]) == (
        300,
        {"count": 0, "mean": None, "median": None},
        0,
    )
    assert report["pairs"] is None and report["answers"] is None and list(report["sources"]) == ["s", "t"]


def test_of_several_samples_the_one_in_the_row_is_accepted():
    found = record(10, 20, 90)
    row = {"messages": found.samples[1].messages}
    report = tallied([Outcome(Prompt("p", "s", {}), row, records={"teacher": found})])["replies"]["teacher"]
    assert (report["accepted"]["mean"], report["dropped"]["mean"], report["dropped"]["count"]) == (20, 50, 2)


def test_a_failed_prompt_has_no_reply():
    failed = Outcome(Prompt("p", "s", {}), None, error="404", records={"teacher": Record("p", "s", [], "404")})
    assert tallied([failed])["replies"]["teacher"]["cut"] is None


def test_sides_are_compared_in_bytes_and_equal_lengths_count_half():
    report = tallied([paired(400, 200), paired(400, 400), paired(200, 400), paired(600, 200)])
    assert report["pairs"] == {"count": 4, "chosen": 100, "rejected": 75, "chosen_longer": 2.5 / 4}
    assert report["replies"]["rejected"]["accepted"]["count"] == 4


def test_labels_are_counted_and_filters_are_not_labels():
    verdicts = [{"answer_label": Verdict(True, "", 1.0)}, {"answer_label": Verdict(False, "wrong_answer", 0.0)}]
    others = [{"answer": Verdict(True, "", 1.0)}, {"chosen.answer_label": Verdict(True, "", 1.0)}]
    outcomes = [traced(1, accepted=True)._replace(verdicts=found) for found in verdicts + others]
    assert tallied(outcomes)["answers"] == {"labelled": 3, "right": 2 / 3}


@pytest.mark.parametrize("seed", range(5))
def test_a_median_is_right_to_within_five_percent(seed):
    draw = random.Random(seed)
    lengths = [int(draw.lognormvariate(6, 1.5)) + 20 for _ in range(999)]
    spread = Spread()
    for length in lengths:
        spread.add(length)
    assert spread.median() == pytest.approx(statistics.median(lengths), rel=0.05)
    assert Spread().median() is None and Spread().mean() is None


def test_memory_does_not_grow_with_the_outcomes():
    tally, outcomes = Tally(), [traced(n, accepted=n % 2) for n in range(1, 3000, 7)]
    for outcome in outcomes:
        tally.add(outcome)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for outcome in outcomes * 20:
        tally.add(outcome)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20_000


def test_warnings_say_the_share_the_basis_and_the_remedy():
    assert warnings(tallied([paired(400, 200)] * 85 + [paired(200, 400)] * 15)) == [
        "chosen is longer in 85% of 100 pairs (about 92.5 against 57.5 tokens, at 4 bytes a token): training may learn "
        "length instead of quality; set filters.max_tokens or balance the lengths"
    ]
    assert warnings(tallied([paired(200, 400)] * 90 + [paired(400, 200)] * 10))[0].startswith(
        "chosen is shorter in 90%"
    )
    assert warnings(tallied([paired(400, 200)] * 80 + [paired(200, 400)] * 20)) == []
    assert warnings(tallied([paired(400, 200)] * 49)) == []
    kept, dropped = [traced(100, accepted=True)] * 94, [traced(300, accepted=False, finish_reason="length")]
    assert warnings(tallied(kept + dropped * 50)) == [
        "teacher: 35% of the replies were cut; raise its max_new_tokens",
        "teacher: accepted replies have 100 tokens on average and dropped ones 300: the filters favour short replies",
    ]
    assert warnings(tallied(kept + dropped * 4)) == []
    assert warnings(tallied([])) == []
