"""Runs of several seeds side by side."""

import io
import json

import pytest
from rich.console import Console

from smolpost.errors import UserError
from smolpost.report.compare import compare_table, evaluations, markdown_table, over_runs


def run(folder, **values):
    """Write a results.json with two measured stages and one without a model."""
    scores = {name: {"value": value, "low": 0, "high": 1, "n": 3} for name, value in values.items()}
    task = {"answer": {"scores": scores | {"think/tokens": {"value": 7.0, "low": 7, "high": 7, "n": 3}}}}
    stages = {
        "tasks": {"kind": "tasks", "folder": "t"},
        "base": {"kind": "sft", "folder": "b", "evaluation": task},
        "sft": {"kind": "sft", "folder": "s", "evaluation": {}},
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"stages": stages}))
    return evaluations(folder)


def test_means_and_ranges_of_the_headlines(tmp_path):
    runs = [run(tmp_path / str(i), think=value, no_think=0.5) for i, value in enumerate((0.25, 1.0, 0.5))]
    assert over_runs(runs) == {
        "base": {("answer", "think"): (1.75 / 3, 0.25, 1.0), ("answer", "no_think"): (0.5, 0.5, 0.5)}
    }
    console = Console(file=io.StringIO(), width=80)
    console.print(compare_table(runs))
    text = " ".join(console.file.getvalue().split())
    assert "mean and range of 3 runs" in text and "0.58" in text and "0.25-1.00" in text and "0.50-0.50" not in text
    assert markdown_table(runs).splitlines() == [
        "| stage | answer think | answer no_think |",
        "|---|---:|---:|",
        "| base | 0.58 (0.25-1.00) | 0.50 |",
    ]


def test_a_range_below_zero_is_readable(tmp_path):
    runs = [run(tmp_path / str(i), think=value) for i, value in enumerate((-1.04, -0.242, 0.5))]
    console = Console(file=io.StringIO(), width=80)
    console.print(compare_table(runs[:2]), compare_table(runs[1:]))
    assert "-1.04 to -0.24" in console.file.getvalue() and "-0.24 to 0.50" in console.file.getvalue()


def test_other_metrics_and_unfinished_runs_are_refused(tmp_path):
    runs = [run(tmp_path / "a", think=1.0), run(tmp_path / "b", no_think=1.0)]
    with pytest.raises(UserError, match=r"run 2 has other stages or metrics than run 1; compare runs of one pipeline"):
        over_runs(runs)
    with pytest.raises(UserError, match=r"has no results.json; `smolpost run` writes it"):
        evaluations(tmp_path)


def test_runs_that_lack_stages_are_refused_by_name(tmp_path):
    runs = [run(tmp_path / name, think=1.0) for name in "ab"]
    del runs[1]["base"]
    with pytest.raises(
        UserError, match=r"only one of run 1 and run 2 has measured base; `smolpost run` without stage="
    ):
        over_runs(runs)
    for content in ("", "{}", '{"stages": [3]}'):
        (tmp_path / "a" / "results.json").write_text(content)
        with pytest.raises(UserError, match=r"results.json has no stages; remove it, and run `smolpost run`"):
            evaluations(tmp_path / "a")
