"""Runs of one pipeline, one seed each: the table of their means and ranges."""

import json
from pathlib import Path

from smolpost.errors import UserError
from smolpost.report.score_tables import head, headlines
from smolpost.screen import Blocks

SWEEP = "sweep.json"  # what a sweep stage leaves beside its weights
RESULTS = "results.json"  # what `smolpost run` leaves in its pipeline's folder


def read_stages(folder: Path) -> dict[str, dict]:
    """What a finished run, in run_dir/pipeline, says of each of its stages.

    Raises:
        UserError: The folder holds no results.
    """
    file = folder / RESULTS
    if not file.is_file():
        raise UserError(f"{folder} has no {RESULTS}; `smolpost run` writes it when the whole pipeline is done")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["stages"])
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{file} holds no stages; remove it, and `smolpost run` writes it again") from None


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
        UserError: The runs have not the same stages and metrics.
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
    """Mean of each headline metric, and below it the lowest and highest run; the values of a single run."""
    rows, columns = _rows_and_columns(runs)
    single = len(runs) == 1
    cells = [
        [stage, *("-" if column not in row else _cell(*row[column], single) for column in columns)]
        for stage, row in rows.items()
    ]
    title = "values of 1 run" if single else f"mean and range of {len(runs)} runs"
    return Blocks(["stage", *map(head, columns)], cells, title=title)


def _rows_and_columns(runs: list[dict[str, dict]]):
    rows = over_runs(runs)
    return rows, list(dict.fromkeys(column for row in rows.values() for column in row))


def _cell(mean: float, low: float, high: float, single: bool) -> str:
    return f"{mean:.2f}" if single else f"{mean:.2f}\n{_range(low, high)}"


def _range(low: float, high: float) -> str:
    return f"{_short(low)}{'-' if low >= 0 else ' to '}{_short(high)}"


def _short(value: float) -> str:
    """Two decimals without the zero before them, so that a range fits a column."""
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3g}"


def markdown_table(runs: list[dict[str, dict]]) -> str:
    """The same for a README: mean (lowest to highest), or the value of a single run."""
    rows, columns = _rows_and_columns(runs)
    lines = ["| stage | " + " | ".join(f"{task} {metric}" for task, metric in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for stage, row in rows.items():
        cells = []
        for column in columns:
            mean, low, high = row.get(column, (None, None, None))
            spread = "" if len(runs) == 1 or mean is None else f" ({low:.2f} to {high:.2f})"
            cells.append("" if mean is None else f"{mean:.2f}{spread}")
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
