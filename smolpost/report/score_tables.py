"""Scores to look at: stages side by side, and all of one model's."""

from collections.abc import Iterator, Mapping

from smolpost.report.heat_map import DEPTH
from smolpost.screen import Blocks

SHORT = {"no_think": "no-th", "accuracy": "acc.", "margin": "marg."}  # in column heads, where width is scarce


def headlines(tasks: Mapping[str, dict]) -> Iterator[tuple[str, str]]:
    """(task, metric) of the metrics that have no slash in their name."""
    for task, result in tasks.items():
        for metric in result["scores"]:
            if "/" not in metric:
                yield task, metric


def results_table(results: Mapping[str, Mapping[str, dict]]) -> Blocks:
    """Models side by side by their headline metrics.

    Args:
        results: Model -> task -> what `evaluation.run.run_task` returned.
    Returns:
        One row per model, `-` where there is no number; without n and intervals, which `scores_table` has.
    """
    columns = list(dict.fromkeys(column for tasks in results.values() for column in headlines(tasks)))
    rows = []
    for model, tasks in results.items():
        scores = [tasks.get(task, {}).get("scores", {}).get(metric) for task, metric in columns]
        rows.append([model, *("-" if score is None else _shown(score["value"]) for score in scores)])
    return Blocks(["stage", *map(head, columns)], rows)


def head(column: tuple[str, str]) -> str:
    """Of a column of a task's metric."""
    task, metric = column
    return f"{task}\n{SHORT.get(metric, metric)}"


def _shown(value: float) -> str:
    """Five characters, as a rule."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def scores_table(tasks: Mapping[str, dict]) -> Blocks:
    """Every score of one model with its interval and number of samples; those by depth are a heat map's."""
    rows, styles = [], []
    for task, result in tasks.items():
        for metric, score in result["scores"].items():
            if DEPTH in metric:
                continue
            interval = "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"
            rows.append([task, metric, f"{score['value']:.3f}", interval, f"{score['n']:,}"])
            styles.append(None)
        for note, said in result["notes"].items():
            if isinstance(said, dict):  # a harness's, by mode; its settings are in the file
                said = said.get("skipped", 0)
            if said:
                rows.append([task, note, f"{said:,}" if isinstance(said, int) else said, "", ""])
                styles.append("yellow")
    return Blocks(["task", "metric", "score", "95% interval", "n"], rows, names=2, styles=styles)
