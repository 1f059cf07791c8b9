"""Scores side by side, and all of one model's."""

import io

from rich.console import Console

from smolpost.report.score_tables import results_table, scores_table


def shown(table):
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return console.file.getvalue()


def test_tables_have_headlines_side_by_side_and_all_of_one():
    def result(**values):
        scores = {name: {"value": v, "low": v - 0.1, "high": v + 0.1, "n": 7} for name, v in values.items()}
        return {"scores": scores, "notes": {"rows_passed_over": 3, "nothing": 0}}

    one = {"answer": result(**{"think": 0.5, "no_think": 0.25, "think/tokens": 9.0}), "recall": result(**{"64": 1.0})}
    text = shown(results_table({"base": one, "sft": {"answer": one["answer"]}}))
    assert "think/tokens" not in text and "no-th" in text
    assert [line.split() for line in text.splitlines() if line.strip().startswith(("base", "sft"))] == [
        ["base", "0.500", "0.250", "1.000"],
        ["sft", "0.500", "0.250", "-"],
    ]
    text = shown(scores_table(one))
    assert ["answer", "think/tokens", "9.000", "8.900", "to", "9.100", "7"] in [
        line.split() for line in text.splitlines()
    ]
    assert "rows_passed_over" in text and "nothing" not in text
