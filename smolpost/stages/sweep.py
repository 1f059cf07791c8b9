"""The mixture of two checkpoints that a rule picks after each weight was evaluated (`selection/sweep.py` states it)."""

from dataclasses import dataclass, field

from smolpost.schema import DTYPES, MISSING, choice, number, numbers, seeded
from smolpost.stages.base import Work, stage_kind, summed
from smolpost.stages.merging import ChosenModel


@stage_kind
@dataclass
class SweepStage(ChosenModel):
    kind: str = "sweep"
    base: str = MISSING  # the input whose config, tokenizer and chat template the result has
    dtype: str = choice(*DTYPES)  # of the evaluated and of the written weights
    seed: int = seeded(1)  # of prompts and sampled replies; evaluation.seed, another, judges the result
    start: str = MISSING  # weight 0: a stage, its soup where it has several seeds, or a merge stage
    added: str = MISSING  # weight 1, likewise: strong at long context
    weights: list[float] = numbers("[0, 1]", 0.05, 0.1, 0.15, 0.2, 0.3)  # of `added`; 0 and 1 always
    long: list[str] = field(default_factory=list)  # TASK/METRIC to raise; -TASK/METRIC where lower is better
    rest: list[str] = field(default_factory=list)  # what raising it may cost, likewise
    max_cost: float = number("[0, inf)", 0.02)  # of `rest` against weight 0, in its unit
    confident: bool = False  # the 95% interval of the cost has to be within max_cost, not only its mean

    VERSION = 2
    SCRIPT = "merge/sweep.py"

    def parents(self):
        return [("start", self.start), ("added", self.added)]

    def metrics_used(self):
        return [("long", metric) for metric in self.long] + [("rest", metric) for metric in self.rest]

    def sides(self, stages) -> tuple[dict[str, float], dict[str, float]]:
        """Checkpoint -> weight behind weight 0, and behind weight 1."""
        return summed({self.start: 1.0}, stages), summed({self.added: 1.0}, stages)

    def input_weights(self, entry, stages):
        return dict.fromkeys([leaf for side in self.sides(stages) for leaf in side], 1.0)

    def key_parts(self, keys, stage):
        return super().key_parts(keys, stage) | {"sides": self.sides(keys.recipe.stages)}

    def make(self, work: Work):
        from smolpost.files import write_json
        from smolpost.report.pareto import save_pareto, sweep_table
        from smolpost.screen import console
        from smolpost.selection.measured import Objective
        from smolpost.selection.sweep import sweep

        long, rest = (Objective(key, getattr(self, key), self.seed) for key in ("long", "rest"))
        report = sweep(
            self.sides(work.recipe.stages), self.weights, self.points(work, [long, rest]), long=long, rest=rest,
            max_cost=self.max_cost, confident=self.confident,
        )  # fmt: skip
        write_json(work.folder / "sweep.json", report)
        save_pareto(report, work.folder / "pareto.png")
        lines = (sweep_table(report), report["rule"], report["caveat"], f"picked: {report['picked']:g}")
        console().print(*lines, sep="\n")
        print(f"every score with its n: {work.folder / 'points'}", flush=True)
        [weights] = [point["weights"] for point in report["points"] if point["picked"]]
        return {"picked": report["picked"], "merge": self.write(work, weights)}
