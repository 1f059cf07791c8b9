"""How much long context to mix into a soup: every weight evaluated in memory, one picked by a stated rule, one written.

python merge/sweep.py pipeline=tiny stage=sweep
"""

from smolpost.cli import job
from smolpost.files import write_json
from smolpost.model.loading import load_for_inference
from smolpost.report.pareto import save_pareto, sweep_table
from smolpost.screen import console
from smolpost.selection.live import evaluator, write_point
from smolpost.selection.measured import Objective, Points
from smolpost.selection.sweep import sweep


def choose(stage, inputs, folder, measure):
    config, base = stage.plan.config, stage.plan.base
    loaded = load_for_inference(inputs[base], dtype=config.dtype)
    evaluate = evaluator(inputs, base, config.dtype, loaded, measure)
    long, rest = (Objective(key, getattr(config, key), config.seed) for key in ("long", "rest"))
    points = Points(folder / "points", evaluate, [long, rest])
    report = sweep(
        stage.plan.sides, config.weights, points, long=long, rest=rest, max_cost=config.max_cost,
        confident=config.confident,
    )  # fmt: skip
    write_json(folder / "sweep.json", report)
    save_pareto(report, folder / "pareto.png")
    console().print(sweep_table(report), report["rule"], report["caveat"], f"picked: {report['picked']:g}", sep="\n")
    print(f"every score with its n: {folder / 'points'}", flush=True)
    [weights] = [point["weights"] for point in report["points"] if point["picked"]]
    return {"picked": report["picked"], "merge": write_point(weights, inputs, base, config.dtype, folder)}


if __name__ == "__main__":
    job("sweep", choose, resumable=True)
