"""Runs of one pipeline, one seed each: the table of their means and ranges."""

import json
from pathlib import Path

from smolpost.errors import UserError
from smolpost.report.score_tables import head, headlines
from smolpost.screen import Blocks

SWEEP = "sweep.json"  # what a sweep stage leaves beside its weights
RESULTS = "results.json"  # what `smolpost run` leaves in its pipeline's folder


def read_stages(folder: Path) -> dict[str, dict]:
    """The stages of a finished run in run_dir/pipeline: name -> entry of its results.

    Raises:
        UserError: The folder holds no results.
    """
    file = folder / RESULTS
    if not file.is_file():
        raise UserError(f"{folder} has no {RESULTS}; `smolpost run` writes it when the pipeline is finished")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["stages"])
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{file} has no stages; remove it, and run `smolpost run` again") from None


def evaluations(folder: Path) -> dict[str, dict]:
    """Stage -> task -> scores, of the stages of a finished run that were measured."""
    return {name: stage["evaluation"] for name, stage in read_stages(folder).items() if stage.get("evaluation")}


def sweeps(folder: Path) -> list[dict]:
    """Reports of the sweep stages of a finished run."""
    folders = [folder / Path(s["folder"]).name for s in read_stages(folder).values() if s["kind"] == "sweep"]
    return [json.loads((folder / SWEEP).read_text(encoding="utf-8")) for folder in folders]


def over_runs(runs: list[dict[str, dict]]) -> dict[str, dict[tuple[str, str], tuple[float, float, float]]]:
    """Stage -> (task, metric) -> (mean, lowest, highest) of the runs' values; headline metrics only.

    Raises:
        UserError: The runs have different stages or metrics.
    """
    shapes = [{stage: list(headlines(tasks)) for stage, tasks in run.items()} for run in runs]
    for number, shape in enumerate(shapes[1:], 2):
        if lacking := shapes[0].keys() ^ shape.keys():
            raise UserError(
                f"only one of run 1 and run {number} has measured {', '.join(sorted(lacking))}; `smolpost run` without "
                "stage= measures what is missing"
            )
        if shape != shapes[0]:
            raise UserError(
                f"run {number} has other stages or metrics than run 1; compare runs of one pipeline and evaluation"
            )
    table = {}
    for stage, columns in shapes[0].items():
        values = {(t, m): [run[stage][t]["scores"][m]["value"] for run in runs] for t, m in columns}
        table[stage] = {column: (sum(v) / len(v), min(v), max(v)) for column, v in values.items()}
    return table


def compare_table(runs: list[dict[str, dict]]) -> Blocks:
    """Mean of each headline metric, and below it the lowest and highest run where they differ.

    A single run has its values alone.
    """
    rows, columns = _rows_and_columns(runs)
    cells = [[stage, *(_cell(row.get(c), "-", "\n{}") for c in columns)] for stage, row in rows.items()]
    title = "values of 1 run" if len(runs) == 1 else f"mean and range of {len(runs)} runs"
    return Blocks(["stage", *map(head, columns)], cells, title=title)


def _rows_and_columns(runs: list[dict[str, dict]]):
    rows = over_runs(runs)
    return rows, list(dict.fromkeys(column for row in rows.values() for column in row))


def markdown_table(runs: list[dict[str, dict]]) -> str:
    """The same table in Markdown: mean (lowest-highest)."""
    rows, columns = _rows_and_columns(runs)
    lines = ["| stage | " + " | ".join(f"{task} {metric}" for task, metric in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for stage, row in rows.items():
        lines.append(f"| {stage} | " + " | ".join(_cell(row.get(c), "", " ({})") for c in columns) + " |")
    return "\n".join(lines)


def _cell(values: tuple[float, float, float] | None, empty: str, spread: str) -> str:
    """The mean, with the lowest and highest value in `spread` unless both are written the same."""
    if values is None:
        return empty
    mean, low, high = values
    ends = [f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" for value in (low, high)]
    between = "-" if low >= 0 else " to "
    return f"{mean:.2f}" + (spread.format(between.join(ends)) if ends[0] != ends[1] else "")
