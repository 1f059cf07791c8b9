"""Tables fit their width, and no number loses a digit: a cut one is another number."""

import io
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from smolpost.data.report import format_report, new_source
from smolpost.report.compare import compare_table
from smolpost.report.heat_map import heat_map_table
from smolpost.report.pareto import greedy_table, sweep_table
from smolpost.report.score_tables import results_table, scores_table
from smolpost.screen import Blocks

WIDTHS = st.integers(60, 200)
NAMES = st.text(string.ascii_lowercase + "_-", min_size=1, max_size=30)
NUMBERS = st.floats(-9999, 9999).map(lambda value: round(value, 4) + 0.0)  # not -0.0


def shown(table, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    return text


def has_numbers(text, numbers):
    """Whether the words of the text hold these, as often as they occur."""
    left = text.split()
    for number in numbers:
        assert number in left, number
        left.remove(number)


@settings(max_examples=40)
@given(st.data(), WIDTHS)
def test_results_and_comparisons_of_any_size(data, width):
    tasks = data.draw(st.lists(NAMES, min_size=1, max_size=12, unique=True))
    stages = data.draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    draw = lambda: data.draw(NUMBERS)  # noqa: E731
    runs = [
        {
            stage: {
                task: {"scores": {m: {"value": draw(), "low": 0, "high": 0, "n": 1} for m in ("think", "margin")}}
                for task in tasks
            }
            for stage in stages
        }
        for _ in range(2)
    ]
    values = [s["value"] for tasks in runs[0].values() for t in tasks.values() for s in t["scores"].values()]
    has_numbers(shown(results_table(runs[0]), width), [f"{v:.3f}" if abs(v) < 10 else f"{v:.2f}" for v in values])
    has_numbers(shown(compare_table(runs[:1]), width), [f"{v:.2f}" for v in values])
    others = [s["value"] for tasks in runs[1].values() for t in tasks.values() for s in t["scores"].values()]
    means = [f"{(a + b) / 2:.2f}" for a, b in zip(values, others, strict=True)]
    has_numbers(shown(compare_table(runs), width), means)


@settings(max_examples=40)
@given(st.data(), WIDTHS)
def test_scores_sweeps_and_soups_of_any_size(data, width):
    def estimate():
        return {key: data.draw(NUMBERS) for key in ("value", "low", "high")}

    names = data.draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    scores = {name: estimate() | {"n": data.draw(st.integers(1, 10**7))} for name in names}
    text = shown(scores_table({"a_long_task_name": {"scores": scores, "notes": {}}}), width)
    has_numbers(text, [f"{s[key]:.3f}" for s in scores.values() for key in s if key != "n"])
    has_numbers(text, [f"{s['n']:,}" for s in scores.values()])
    flags = {"picked": True, "pareto": True, "allowed": False}
    points = [{"weight": 0.1, "long": estimate(), "rest": estimate(), "cost": estimate()} | flags for _ in names]
    ingredients = [{"name": name, "long": estimate(), "rest": estimate()} for name in names]
    text = shown(sweep_table({"points": points, "ingredients": ingredients}), width)
    has_numbers(text, [f"{p[key]['value']:.3f}" for p in points for key in ("long", "rest", "cost")])
    alone = [{"name": name} | estimate() for name in names]
    trials = [estimate() | {"change": estimate(), "kept": False} for _ in names[1:]]
    text = shown(greedy_table({"alone": alone, "trials": trials}), width)
    has_numbers(text, [f"{t['change']['value']:.3f}" for t in trials])


@settings(max_examples=40)
@given(st.data(), WIDTHS)
def test_ledgers_of_any_size(data, width):
    sources = data.draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    reasons = data.draw(st.lists(NAMES, min_size=1, max_size=9, unique=True))

    def entry():
        counts = {key: data.draw(st.integers(0, 10**10)) for key in ("rows_read", "tokens_read", "tokens_trained")}
        lengths = {"50": 12345, "90": 1, "99": 123456, "100": 1234567}
        return new_source() | counts | {"masked": dict.fromkeys(reasons, 98765), "length_percentiles": lengths}

    entries = {name: entry() for name in sources}
    totals = entry() | {"packs": 1, "tokens_per_pack": 2.0, "fill_percent": 3.0}
    text = shown(format_report({"settings": {"kind": "sft"}, "sources": entries, "totals": totals}), width)
    has_numbers(text, [f"{e['rows_read']:,}" for e in entries.values()])
    has_numbers(text, ["12.3k/123k/1.23M"] * len(entries) + ["98.8k"] * len(entries) * len(reasons))


def test_heat_maps_of_many_lengths():
    scores = {f"{2**n}/depth_{d / 4:.2f}": {"value": n / 20} for n in range(6, 20) for d in range(5)}
    text = shown(heat_map_table(scores, "needles"), 60)
    has_numbers(text, [f"{n / 20:.2f}" for n in range(6, 20) for _ in range(5)] + [str(2**n) for n in range(6, 20)])


def test_columns_that_do_not_fit_stand_below_and_a_shared_head_is_written_once_in_each_block():
    heads = ["stage", "answer\nthink", "answer\nno-th", "recall\n256", "recall\n1024"]
    rows = [["base", "0.123", "0.456", "0.789", "-1.234"], ["sft", "1", "2", "3", "4"]]
    assert [line.rstrip() for line in shown(Blocks(heads, rows, title="runs"), 60).splitlines()] == [
        "                runs",
        "       answer         recall",
        "stage   think  no-th     256    1024",
        "────────────────────────────────────",
        "base    0.123  0.456   0.789  -1.234",
        "sft         1      2       3       4",
    ]
    assert [line.rstrip() for line in shown(Blocks(heads, rows), 26).splitlines()] == [
        "      answer       recall",
        "stage  think no-th    256",
        "─────────────────────────",
        "base   0.123 0.456  0.789",
        "sft        1     2      3",
        "",
        "      recall",
        "stage   1024",
        "────────────",
        "base  -1.234",
        "sft        4",
    ]


@pytest.mark.parametrize("width", [20, 60])
def test_names_fold_and_markup_is_text(width):
    text = shown(Blocks(["source", "n"], [["[red]" + "x" * 70, "123456"]]), width)
    assert text.count("x") == 70 and "[red]" in text and "123456" in text.split()


def test_a_title_wider_than_its_table_is_one_line():
    text = shown(Blocks(["n"], [["1"]], title="sft: ruler by length and depth"), 60)
    assert text.splitlines()[0] == "sft: ruler by length and depth"
