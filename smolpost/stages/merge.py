"""A weighted mean of checkpoints; a stage with several seeds stands for their equal-weight soup."""

from dataclasses import dataclass, field

from smolpost.errors import Wrong
from smolpost.schema import DTYPES, MISSING, choice, count, number, tuning
from smolpost.stages.base import Work, stage_kind, summed
from smolpost.stages.merging import MergedModel


@stage_kind
@dataclass
class MergeStage(MergedModel):
    kind: str = "merge"
    inputs: dict[str, float] = field(default_factory=dict)  # stage name or "checkpoint" -> weight; they sum to 1
    base: str = MISSING  # the input whose config, tokenizer and chat template the result has
    dtype: str = choice(*DTYPES)  # of the merged weights on disk; sums are fp32 throughout
    allow_template_change: bool = tuning(False)  # merge inputs that speak other chat templates than the base
    average: str = choice("final", "lawa", "ema")  # what an input stands for: its last weights, or a mean along its run
    average_last: int = count(5)  # lawa: snapshots, the final weights among them
    ema_decay: float = number("[0, 1)", 0.8)  # ema: per snapshot

    VERSION = 1
    SCRIPT = "merge/linear.py"

    def parents(self):
        return [("inputs", name) for name in self.inputs]

    def input_weights(self, entry, stages):
        return summed(self.inputs, stages)

    def mean_of(self):
        # The snapshots of averages along runs are known only once the runs are finished.
        return self.inputs if self.average == "final" else None

    def check(self, key, recipe, place):
        total = sum(self.inputs.values())
        if abs(total - 1) > 1e-6:
            parts = [f"{name} {weight:g} ({place(f'{key}.inputs.{name}')})" for name, weight in self.inputs.items()]
            last = list(self.inputs)[-1] if parts else "NAME"
            raise Wrong(
                f"{key}.inputs",
                f" sum to {total:g}, and weights of a linear merge sum to 1: {', '.join(parts) or '(none)'}; change "
                f"one as {key}.inputs.{last}=WEIGHT, or leave it out with ~{key}.inputs.{last}",
            )
        super().check(key, recipe, place)

    def key_parts(self, keys, stage):
        return {"weights": stage.weights}

    def make(self, work: Work):
        from smolpost.merging.linear import merge
        from smolpost.merging.trajectory import averaged

        weighted = [(name, work.inputs[name], weight) for name, weight in work.stage.weights.items()]
        weighted = averaged(weighted, self.average, last=self.average_last, decay=self.ema_decay)
        return merge(
            weighted, work.stage.base, work.folder, self.dtype, verification="full",
            allow_template_change=self.allow_template_change,
        )  # fmt: skip
