"""What the stages share that make one model of several: `merge`, `mergekit`, `sweep`, `greedy`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from smolpost.errors import Wrong
from smolpost.stages.base import Stage, Work, base_leaf, leaves


class MergedModel(Stage):
    """A stage whose model is made of its inputs' weights; `base` gives it config, tokenizer and chat template."""

    MAKES_MODEL: ClassVar[bool] = True
    base: str

    def input_weights(self, entry, stages):
        return dict.fromkeys([leaf for _, parent in self.parents() for leaf in leaves(parent, stages)], 1.0)

    def base_input(self, stages):
        return base_leaf(self.base, stages)

    def template_of(self, stages):
        return stages[self.base].template_of(stages) if self.base in stages else None

    def check(self, key, recipe, place):
        check_one_of(f"{key}.base", self.base, list(dict.fromkeys(name for _, name in self.parents())))


def check_one_of(key: str, name: str, inputs: list[str] | Mapping) -> None:
    """
    Raises:
        Wrong: The name is not an input of the stage.
    """
    if name not in inputs:
        raise Wrong(key, f"={name} is not an input of the stage; choose one of: {', '.join(inputs) or '(none)'}")


class ChosenModel(MergedModel):
    """A stage that evaluates merges in memory and writes the one that is chosen."""

    RESUMABLE: ClassVar[bool] = True
    dtype: str
    seed: int

    def metrics_used(self) -> list[tuple[str, str]]:
        """(key, "TASK/METRIC") of every score that chooses; "-TASK/METRIC" where lower is better."""
        return []

    def tasks_measured(self):
        return list(dict.fromkeys(metric.removeprefix("-").partition("/")[0] for _, metric in self.metrics_used()))

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        for name, metric in self.metrics_used():
            task, slash, _ = metric.removeprefix("-").partition("/")
            if not slash or task not in recipe.evaluation.tasks:
                raise Wrong(
                    f"{key}.{name}",
                    f"={metric} is not TASK/METRIC with a task of evaluation.tasks; tasks: "
                    f"{', '.join(recipe.evaluation.tasks) or '(none)'}; or leave the stage out with ~{key}",
                )

    def key_parts(self, keys, stage):
        return {"tasks": {task: keys.task(task, self.seed) for task in self.tasks_measured()}}

    def points(self, work: Work, objectives: list) -> Any:
        """Points in weight space that are evaluated when first asked for.

        Args:
            objectives: `selection.measured.Objective`s that will be asked of them.
        """
        from smolpost.evaluation.task import Context
        from smolpost.model.loading import load_for_inference
        from smolpost.selection.live import evaluator, measurer
        from smolpost.selection.measured import Points

        spec, base = work.recipe.evaluation, work.stage.base
        shared = Context(spec.today, self.seed, work.rows)
        tasks = {name: spec.tasks[name].build(name, shared) for name in self.tasks_measured()}
        measure = measurer(tasks, batch_tokens=spec.batch_tokens, seed=self.seed)
        loaded = load_for_inference(work.inputs[base], dtype=self.dtype)
        evaluate = evaluator(work.inputs, base, self.dtype, loaded, measure)
        return Points(work.folder / "points", evaluate, objectives)

    def write(self, work: Work, weights: dict[str, float]) -> dict[str, Any]:
        """Write the chosen merge as the stage's model; the report of the merge."""
        from smolpost.selection.live import write_point

        return write_point(weights, work.inputs, work.stage.base, self.dtype, work.folder)
