"""Samples to scores: weighted means with bootstrap intervals.

The intervals are the percentile bootstrap's (Efron and Tibshirani 1993, chapter 13) over clusters of samples that are
not independent, such as several replies to one prompt.

Shapes: R resamples, C clusters, M metrics.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from smolpost.evaluation.task import Sample
from smolpost.inference.seeds import derive_seed

RESAMPLES = 1000
CONFIDENCE = 0.95
BLOCK = 2**22  # counts that are held at once

# Cluster -> [sum of weight x value, sum of weights] of one metric; clusters without the metric are left out.
Sums = Mapping[str, Sequence[float]]


class Estimate(NamedTuple):
    """A number with what resampling the samples makes of it.

    Attributes:
        value: Of the samples as they are.
        draws: [R]; NaN where a draw has no sample with the metric.
    """

    value: float
    draws: np.ndarray

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference sample by sample, where both have the same clusters, metrics and seed."""
        return Estimate(self.value - other.value, self.draws - other.draws)

    @property
    def standard_error(self) -> float:
        """Standard deviation of the draws."""
        return float(np.nanstd(self.draws))

    def report(self) -> dict[str, float]:
        """ "value", and "low" and "high", the ends of its 95% interval."""
        tails = 100 * np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        low, high = np.percentile(self.draws[~np.isnan(self.draws)], tails)
        return {"value": float(self.value), "low": float(low), "high": float(high)}


def aggregate(samples: Iterable[Sample], seed: int = 0) -> dict[str, dict[str, float]]:
    """The mean of every metric over the samples that have it.

    Where all clusters agree the interval has no width, however small `n` is.

    Args:
        samples: Of one task.
        seed: Of the resampling.
    Returns:
        Metric -> {"value": weighted mean, "low", "high": ends of the 95% interval, "n": number of samples}, in the
        order in which the metrics first occur.
    """
    samples = list(samples)
    counts: dict[str, int] = defaultdict(int)
    for sample in samples:
        for metric in sample.metrics:
            counts[metric] += 1
    return {
        metric: _estimate(sums, derive_seed(seed, metric)).report() | {"n": counts[metric]}
        for metric, sums in sums_of(samples).items()
    }


def sums_of(samples: Iterable[Sample]) -> dict[str, Sums]:
    """The sums of every metric, in the order in which the metrics first occur."""
    sums: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for sample in samples:
        for metric, value in sample.metrics.items():
            weight = sample.weights.get(metric, 1.0)
            found = sums[metric].setdefault(sample.cluster or sample.id, [0.0, 0.0])
            found[0] += weight * value
            found[1] += weight
    return dict(sums)


def resampled(metrics: Sequence[Sums], seed: int) -> np.ndarray:
    """Means of metrics over clusters that are drawn with replacement, the same ones for all metrics.

    Two models that were asked the same get the same draws, so the difference of their means is a paired one.

    Args:
        metrics: Of one task.
        seed: Of the draws; an evaluation takes `derive_seed(seed, METRIC)` for each metric alone.
    Returns:
        [M, R]; NaN where a draw has no sample with the metric.
    """
    # In order of their names, so that two models with the same clusters get the same draws.
    clusters = sorted(set().union(*metrics))
    number = len(clusters)
    columns = np.concatenate([np.array([sums.get(c, (0.0, 0.0)) for c in clusters]) for sums in metrics], 1)  # [C, 2M]
    rng, shares = np.random.default_rng(seed), np.full(number, 1 / number)
    blocks = np.array_split(np.arange(RESAMPLES), -(-RESAMPLES * number // BLOCK))  # of resamples; no number changes
    drawn = (rng.multinomial(number, shares, size=len(block)) for block in blocks)  # [r, C] each
    sums = np.concatenate([counts @ columns for counts in drawn])  # [R, 2M]
    totals, weights = sums[:, ::2].T, sums[:, 1::2].T  # [M, R] each
    return np.divide(totals, weights, out=np.full(totals.shape, np.nan), where=weights > 0)


def _estimate(sums: Sums, seed: int) -> Estimate:
    """One metric's mean."""
    total, weight = np.array([sums[cluster] for cluster in sorted(sums)]).sum(0)
    return Estimate(float(total / weight), resampled([sums], seed)[0])
