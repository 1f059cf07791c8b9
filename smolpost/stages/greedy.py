"""The equal-weight soup of the checkpoints that raise, or keep, a held-out score (arXiv:2203.05482, Recipe 1)."""

from dataclasses import dataclass, field

from smolpost.schema import DTYPES, MISSING, choice, seeded
from smolpost.stages.base import Work, stage_kind
from smolpost.stages.merging import ChosenModel


@stage_kind
@dataclass
class GreedyStage(ChosenModel):
    kind: str = "greedy"
    base: str = MISSING  # the input whose config, tokenizer and chat template the result has
    dtype: str = choice(*DTYPES)  # of the evaluated and of the written weights
    seed: int = seeded(1)  # of prompts and sampled replies; evaluation.seed, another, judges the result
    inputs: list[str] = field(default_factory=list)  # stages; every seed is a candidate
    metrics: list[str] = field(default_factory=list)  # TASK/METRIC whose mean decides; -TASK/METRIC: lower is better

    VERSION = 2
    SCRIPT = "merge/greedy.py"

    def parents(self):
        return [("inputs", name) for name in self.inputs]

    def metrics_used(self):
        return [("metrics", metric) for metric in self.metrics]

    def make(self, work: Work):
        from smolpost.files import write_json
        from smolpost.report.pareto import greedy_table
        from smolpost.screen import console
        from smolpost.selection.greedy import greedy
        from smolpost.selection.measured import Objective

        objective = Objective("metrics", self.metrics, self.seed)
        report = greedy(list(work.inputs), self.points(work, [objective]), objective)
        write_json(work.folder / "greedy.json", report)
        console().print(greedy_table(report), report["rule"], f"kept: {', '.join(report['kept'])}", sep="\n")
        print(f"every score with its n: {work.folder / 'points'}", flush=True)
        return {"kept": report["kept"], "merge": self.write(work, report["weights"])}
