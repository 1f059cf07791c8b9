"""A greedy soup: checkpoints join one by one where a held-out score does not fall, and the mean of the kept is written.

python merge/greedy.py pipeline=tiny stage=greedy
"""

from smolpost.cli import job
from smolpost.files import write_json
from smolpost.model.loading import load_for_inference
from smolpost.report.pareto import greedy_table
from smolpost.screen import console
from smolpost.selection.greedy import greedy
from smolpost.selection.live import evaluator, write_point
from smolpost.selection.measured import Objective, Points


def choose(stage, inputs, folder, measure):
    config, base = stage.plan.config, stage.plan.base
    loaded = load_for_inference(inputs[base], dtype=config.dtype)
    evaluate = evaluator(inputs, base, config.dtype, loaded, measure)
    objective = Objective("metrics", config.metrics, config.seed)
    report = greedy(list(inputs), Points(folder / "points", evaluate, [objective]), objective)
    write_json(folder / "greedy.json", report)
    console().print(greedy_table(report), report["rule"], f"kept: {', '.join(report['kept'])}", sep="\n")
    print(f"every score with its n: {folder / 'points'}", flush=True)
    return {"kept": report["kept"], "merge": write_point(report["weights"], inputs, base, config.dtype, folder)}


if __name__ == "__main__":
    job("greedy", choose, resumable=True)
