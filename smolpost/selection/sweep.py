"""How much of another checkpoint to mix in: every weight is evaluated, and a rule that is stated beforehand picks one.

The point with weight w is (1 - w) x base side + w x added side. The base side may be a soup, the added side a
checkpoint that is strong at long context. The added side raises the objective `long` and lowers the objective `rest`.

The rule picks the smallest weight that does as well as possible at a bounded cost:

1. A weight is allowed if its `rest` is below that of weight 0 by at most `max_cost`. The means are compared, or with
   `confident` the upper end of the cost's 95% interval (a test of non-inferiority with margin `max_cost`). Weight 0
   is always allowed, so one weight is always picked.
2. The best weight is the allowed one with the largest `long`.
3. The picked weight is the smallest allowed one whose `long` is within one standard error of the best: the
   one-standard-error rule (Breiman et al. 1984, chapter 3) with the error of the difference. A tie goes to the smaller
   weight.

All points answer the same prompts, so costs, gains and their errors come from a bootstrap of paired differences over
prompts. Intervals are those of each point alone, not corrected for the number of points. The picked weight's scores
are biased upward by the selection; only an evaluation on other prompts shows its real ones.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from smolpost.errors import UserError
from smolpost.evaluation.scores import CONFIDENCE, Estimate
from smolpost.progress import Progress
from smolpost.selection.measured import Measured, Objective, Points

ROUNDING = 1e-9  # of differences of means: 0.95 - 0.93 is not to cost more than 0.02

CAVEAT = (
    "The weight was chosen on these prompts, so its scores here are biased upward; judge it by an evaluation on other "
    "prompts."
)


def mixed(sides: Sequence[Mapping[str, float]], weight: float) -> dict[str, float]:
    """Weights of the checkpoints behind both sides at a point.

    Args:
        sides: Checkpoint -> weight within the base side, and within the added side; each sums to 1.
        weight: Of the added side.
    """
    base, added = sides
    names = dict.fromkeys([*base, *added])
    return {name: (1 - weight) * base.get(name, 0.0) + weight * added.get(name, 0.0) for name in names}


def sweep(
    sides: Sequence[Mapping[str, float]],
    weights: Sequence[float],
    points: Points,
    *,
    long: Objective,
    rest: Objective,
    max_cost: float = 0.02,
    confident: bool = False,
) -> dict[str, Any]:
    """Evaluate the points of a sweep and pick one by the rule above.

    Args:
        sides: As for `mixed`.
        weights: Of the added side, in [0, 1]; 0 and 1 are added where they are missing.
        points: Evaluates, and keeps what it found; made with both objectives.
        max_cost: Of `rest`, in its unit; >= 0.
        confident: Allow only weights whose cost is shown to be within `max_cost`.
    Returns:
        `rule` and `caveat` in words, `long` and `rest` (metrics), `max_cost`, `confident`, `picked` (weight),
        `points` by weight: `weight`, `weights` (checkpoint -> weight), `long`, `rest`, `cost` and `gain` against
        weight 0 (each value, low, high), `scores`, and whether it is `allowed`, `pareto` (no other point is at least
        as good in both and better in one) and `picked`; `ingredients`: where a side has several checkpoints, each of
        them evaluated alone, with `name`, `long`, `rest`, `scores`.
    Raises:
        UserError: A weight is outside [0, 1] or given twice, `max_cost` is negative, or as `Points.measure`.
    """
    _check(weights, max_cost)
    ordered = sorted({0.0, 1.0, *map(float, weights)})
    alone = dict.fromkeys(name for side in sides if len(side) > 1 for name in side)
    with Progress("sweep", len(ordered) + len(alone), "point") as progress:
        measured = [points.measure(f"weight-{weight!r}", mixed(sides, weight), progress) for weight in ordered]
        ingredients = {name: points.measure(f"alone-{name}", {name: 1.0}, progress) for name in alone}
    longs, rests = ([objective.of(point) for point in measured] for objective in (long, rest))
    allowed, picked = choose(longs, rests, max_cost=max_cost, confident=confident)
    front = pareto([(a.value, b.value) for a, b in zip(longs, rests, strict=True)])
    return {
        "rule": rule(max_cost, confident),
        "caveat": CAVEAT,
        "long": long.metrics,
        "rest": rest.metrics,
        "max_cost": max_cost,
        "confident": confident,
        "picked": ordered[picked],
        "points": [
            {"weight": weight, "weights": mixed(sides, weight)}
            | {"long": longs[i].report(), "rest": rests[i].report()}
            | {"gain": (longs[i] - longs[0]).report(), "cost": (rests[0] - rests[i]).report()}
            | {"allowed": allowed[i], "pareto": front[i], "picked": i == picked, "scores": measured[i].scores}
            for i, weight in enumerate(ordered)
        ],
        "ingredients": [_ingredient(name, measured, long, rest) for name, measured in ingredients.items()],
    }


def choose(
    longs: Sequence[Estimate], rests: Sequence[Estimate], *, max_cost: float, confident: bool
) -> tuple[list[bool], int]:
    """The rule that this file states: which points are allowed, and the index of the picked one.

    Args:
        longs, rests: By ascending weight, the first one weight 0's.
    """
    costs = [(rests[0] - point) for point in rests]
    bounds = [cost.report()["high"] if confident else cost.value for cost in costs]
    allowed = [bound <= max_cost + ROUNDING for bound in bounds]
    best = max((i for i, fine in enumerate(allowed) if fine), key=lambda i: longs[i].value)
    for i, fine in enumerate(allowed):
        gap = longs[best] - longs[i]
        if fine and gap.value <= gap.standard_error + ROUNDING:
            return allowed, i
    raise AssertionError("the best point is within an error of itself")


def rule(max_cost: float, confident: bool) -> str:
    """The rule in words, for reports."""
    how = f"with {CONFIDENCE:.0%} confidence" if confident else "by their means"
    return (
        f"Allowed: weights that lose at most {max_cost:g} of `rest` against weight 0, {how}. Picked: the smallest "
        "allowed weight whose `long` is within one standard error of the best allowed one. Differences are taken "
        "prompt by prompt."
    )


def pareto(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which points are not dominated; a point dominates another if it is nowhere worse and somewhere better."""
    values = np.array(points)
    return [not any((other >= point).all() and (other > point).any() for other in values) for point in values]


def _ingredient(name: str, measured: Measured, long: Objective, rest: Objective) -> dict[str, Any]:
    reports = {"long": long.of(measured).report(), "rest": rest.of(measured).report()}
    return {"name": name, **reports, "scores": measured.scores}


def _check(weights: Sequence[float], max_cost: float) -> None:
    for weight in weights:
        if not 0 <= weight <= 1:
            raise UserError(f"weights: {weight:g} is outside [0, 1], the share of the added side")
        if list(weights).count(weight) > 1:
            raise UserError(f"weights: {weight:g} is given {list(weights).count(weight)} times; give it once")
    if not (max_cost >= 0 and math.isfinite(max_cost)):
        raise UserError(f"max_cost={max_cost:g} must be at least 0, in the unit of rest")
