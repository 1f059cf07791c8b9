"""Scores of points in weight space: measured once, kept as files, compared prompt by prompt.

Shapes: R resamples, C clusters of prompts.
"""

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smolpost.errors import UserError
from smolpost.files import write_json
from smolpost.progress import Progress

RESAMPLES = 1000
CONFIDENCE = 0.95

# (weights of the inputs, folder for its files) -> task -> {"scores": {metric: {value, n, low, high}},
# "samples": [{id, cluster, metrics: {metric: value}, weights: {metric: weight}}]}, as the evaluation keeps them.
Evaluate = Callable[[dict[str, float], Path], Mapping[str, Mapping[str, Any]]]


class Measured(NamedTuple):
    """What is known of one point.

    Attributes:
        scores: "TASK/METRIC" -> {"value", "n", "low", "high"}.
        sums: "TASK/METRIC" of an objective -> cluster of prompts -> [weighted sum of the values, sum of the weights];
            every cluster of the task, with zeros where none of its samples has the metric.
    """

    scores: dict[str, dict[str, float]]
    sums: dict[str, dict[str, list[float]]]


class Estimate(NamedTuple):
    """A number with what resampling the prompts makes of it: `draws` is [R], NaN where a draw has no such sample."""

    value: float
    draws: np.ndarray

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference prompt by prompt, where both were measured on the same ones."""
        return Estimate(self.value - other.value, self.draws - other.draws)

    @property
    def standard_error(self) -> float:
        return float(np.nanstd(self.draws))

    def report(self) -> dict[str, float]:
        """The value and the ends of its interval."""
        tails = 100 * np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        low, high = np.nanpercentile(self.draws, tails)
        return {"value": self.value, "low": float(low), "high": float(high)}


class Objective:
    """A number to maximise: the mean of scores, each of one unit.

    Args:
        key: For messages, e.g. "long".
        metrics: "TASK/METRIC" each; a leading "-" turns one round whose lower values are better: "-perplexity/loss".
        seed: Of the resampling.
    Raises:
        UserError: No metric is named, or one twice.
    """

    def __init__(self, key: str, metrics: Sequence[str], seed: int = 0):
        self.key, self.metrics, self.seed = key, list(metrics), seed
        self.signs = {name.removeprefix("-"): -1.0 if name.startswith("-") else 1.0 for name in metrics}
        if not metrics or len(self.signs) < len(metrics):
            raise UserError(f"{key}={list(metrics)} must name at least one score, each once, as TASK/METRIC")

    def of(self, measured: Measured) -> Estimate:
        """The percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over clusters of prompts, drawn per task.

        The same prompts get the same draws at every point, so a difference of two estimates is a paired one.
        """
        draws = [sign * self._resampled(metric, measured.sums[metric]) for metric, sign in self.signs.items()]
        values = [sign * measured.scores[metric]["value"] for metric, sign in self.signs.items()]
        return Estimate(sum(values) / len(values), np.mean(draws, axis=0))

    def _resampled(self, metric: str, sums: dict[str, list[float]]) -> np.ndarray:
        number, task = len(sums), metric.partition("/")[0]
        random = np.random.default_rng([self.seed, zlib.crc32(task.encode())])
        drawn = random.multinomial(number, np.full(number, 1 / number), size=RESAMPLES)  # [R, C]
        totals, weights = (drawn @ np.array([sums[cluster] for cluster in sorted(sums)])).T  # [R] each
        return np.divide(totals, weights, out=np.full(RESAMPLES, np.nan), where=weights > 0)


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
                sums[metric] = _sums(tasks[task]["samples"], name)
        return Measured(scores, sums)


def _sums(samples: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[float]]:
    sums: dict[str, list[float]] = {}
    for sample in samples:
        total = sums.setdefault(sample["cluster"] or sample["id"], [0.0, 0.0])
        if metric in sample["metrics"]:
            weight = sample["weights"].get(metric, 1.0)
            total[0] += weight * sample["metrics"][metric]
            total[1] += weight
    return sums
