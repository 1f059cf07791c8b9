"""Samples to scores: weighted means with bootstrap intervals."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from smolpost.evaluation.task import Sample
from smolpost.inference.seeds import derive_seed

RESAMPLES = 1000
CONFIDENCE = 0.95
BLOCK = 2**22  # counts that are held at once


def aggregate(samples: Iterable[Sample], seed: int = 0) -> dict[str, dict[str, float]]:
    """The mean of every metric over the samples that have it.

    The interval is the percentile bootstrap's (Efron and Tibshirani 1993, chapter 13) over whole clusters. Where all
    clusters agree it has no width, which says nothing against a small `n`.

    Args:
        samples: Of one task.
        seed: Of the resampling.
    Returns:
        Metric -> {"value": weighted mean, "n": number of samples, "low", "high": ends of the 95% interval}, in the
        order in which the metrics first occur.
    """
    sums: dict[str, dict[str, np.ndarray]] = defaultdict(lambda: defaultdict(lambda: np.zeros(2)))
    counts: dict[str, int] = defaultdict(int)
    for sample in samples:
        for metric, value in sample.metrics.items():
            weight = sample.weights.get(metric, 1.0)
            sums[metric][sample.cluster or sample.id] += (weight * value, weight)
            counts[metric] += 1
    # In order of their names, so that two models with the same clusters are resampled alike.
    ordered = {metric: np.array([clusters[name] for name in sorted(clusters)]) for metric, clusters in sums.items()}
    return {
        metric: _score(clusters, derive_seed(seed, metric)) | {"n": counts[metric]}
        for metric, clusters in ordered.items()
    }


def _score(clusters: np.ndarray, seed: int) -> dict[str, float]:
    """Mean and interval; clusters: [N, 2], weighted sum and weight of each."""
    total, weight = clusters.sum(0)
    number = len(clusters)
    rng, shares = np.random.default_rng(seed), np.full(number, 1 / number)
    blocks = np.array_split(np.arange(RESAMPLES), -(-RESAMPLES * number // BLOCK))  # of resamples; no number changes
    drawn = (rng.multinomial(number, shares, size=len(block)) for block in blocks)  # [r, N] each
    totals, weights = np.concatenate([counts @ clusters for counts in drawn]).T  # [R] each
    tails = 100 * np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = np.percentile(totals[weights > 0] / weights[weights > 0], tails)
    return {"value": float(total / weight), "low": float(low), "high": float(high)}
