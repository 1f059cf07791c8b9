"""Scores of points in weight space: measured once, kept as files, compared prompt by prompt."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smolpost.errors import UserError
from smolpost.evaluation.scores import Estimate, Sums, resampled, sums_of
from smolpost.evaluation.task import Sample
from smolpost.files import write_json
from smolpost.inference.seeds import derive_seed
from smolpost.progress import Progress

# (weights of the inputs, folder for its files) -> task -> {"scores": {metric: {value, n, low, high}},
# "samples": [{id, cluster, metrics: {metric: value}, weights: {metric: weight}}]}, as the evaluation keeps them.
Evaluate = Callable[[dict[str, float], Path], Mapping[str, Mapping[str, Any]]]


class Measured(NamedTuple):
    """What is known of one point.

    Attributes:
        scores: "TASK/METRIC" -> {"value", "n", "low", "high"}.
        sums: "TASK/METRIC" of an objective -> its clusters of prompts, as the evaluation's bootstrap draws them.
    """

    scores: dict[str, dict[str, float]]
    sums: dict[str, Sums]


class Objective:
    """A number to maximise: the mean of scores, each of one unit.

    Args:
        key: For messages, e.g. "long".
        metrics: "TASK/METRIC" each; a leading "-" where lower values are better: "-perplexity/loss".
        seed: Of the resampling; the evaluation's, so that one score has one interval.
    Raises:
        UserError: No metric is named, or one twice.
    """

    def __init__(self, key: str, metrics: Sequence[str], seed: int):
        self.key, self.metrics, self.seed = key, list(metrics), seed
        self.signs = {name.removeprefix("-"): -1.0 if name.startswith("-") else 1.0 for name in metrics}
        if not metrics or len(self.signs) < len(metrics):
            raise UserError(f"{key}={list(metrics)} must name at least one score, each once, as TASK/METRIC")

    def of(self, measured: Measured) -> Estimate:
        """The objective at a point.

        One score alone has the interval that the evaluation gives it. Of several, those of one task are resampled
        together, as they may come from the same prompts. The same prompts get the same draws at every point, so the
        difference of two estimates is a paired one.
        """
        by_task: dict[str, list[str]] = defaultdict(list)
        for metric in self.signs:
            by_task[metric.partition("/")[0]].append(metric)
        draws: dict[str, np.ndarray] = {}
        for metrics in by_task.values():
            drawn_by = metrics if len(self.signs) > 1 else [metrics[0].partition("/")[2]]
            sums = [measured.sums[metric] for metric in metrics]
            draws |= zip(metrics, resampled(sums, derive_seed(self.seed, *drawn_by)), strict=True)
        values = [sign * measured.scores[metric]["value"] for metric, sign in self.signs.items()]
        signed = [sign * draws[metric] for metric, sign in self.signs.items()]
        return Estimate(sum(values) / len(values), np.mean(signed, axis=0))


class Points:
    """Points that are evaluated when first asked for; a finished one is read from its file `NAME.json`.

    Args:
        folder: Of the points; the files of one evaluation lie in its subfolder NAME, where a killed one goes on.
        evaluate: Measures the mean with these weights.
        objectives: What will be made of the scores.
    """

    def __init__(self, folder: Path, evaluate: Evaluate, objectives: Sequence[Objective]):
        self._folder, self._evaluate, self._objectives = folder, evaluate, objectives
        self._clusters: dict[str, set[str]] = {}

    def measure(self, name: str, weights: dict[str, float], progress: Progress | None = None) -> Measured:
        """
        Args:
            progress: Of the points; learns of this one.
        Raises:
            UserError: An objective's score is not among the scores or not finite, or a point was measured on other
                prompts than the ones before it.
        """
        file = self._folder / f"{name}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if kept is None or kept["weights"] != weights:
            measured = self._measured(self._evaluate(weights, self._folder / name))
            write_json(file, {"weights": weights, **measured._asdict()})
            if progress:
                progress.update()
        else:
            measured = Measured(kept["scores"], kept["sums"])
            if progress:
                progress.find()
        for metric, sums in measured.sums.items():
            if self._clusters.setdefault(metric, set(sums)) != set(sums):
                raise UserError(f"{file}: {metric} was measured on other prompts than at the other points; delete it")
        return measured

    def _measured(self, tasks: Mapping[str, Mapping[str, Any]]) -> Measured:
        scores = {f"{task}/{metric}": s for task, found in tasks.items() for metric, s in found["scores"].items()}
        sums = {}
        for objective in self._objectives:
            for metric in objective.signs:
                if metric not in scores:
                    raise UserError(f"{objective.key}: {metric} is not a score; choose from {', '.join(scores)}")
                if not math.isfinite(scores[metric]["value"]):
                    raise UserError(f"{objective.key}: {metric} is {scores[metric]['value']}; choose another score")
                task, _, name = metric.partition("/")
                samples = [Sample(s["id"], s["metrics"], s["weights"], s["cluster"]) for s in tasks[task]["samples"]]
                sums[metric] = sums_of(samples)[name]
        return Measured(scores, sums)
