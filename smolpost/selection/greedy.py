"""Greedy soup: candidates join one by one, each only where the mean does not get worse on held-out prompts.

Recipe 1 of arXiv:2203.05482 (Wortsman et al. 2022): candidates are sorted by their own score, best first. A candidate
is kept if the equal-weight mean of the kept ones and it scores at least as well as the mean without it.

Every trial is evaluated as the mean that a merge would write, bit for bit: its fp32 sum is computed from the mapped
checkpoints, one chunk at a time. A running sum that candidates are added to and subtracted from would read less, but
it would need the memory of an fp32 model and round differently, so the evaluated model would not be the written one.
The result's held-out score is biased upward, because that score chose it.
"""

from collections.abc import Sequence
from typing import Any

from smolpost.errors import UserError
from smolpost.evaluation.scores import Estimate
from smolpost.progress import Progress
from smolpost.selection.measured import Objective, Points

RULE = (
    "Candidates by their own held-out score, best first; each is kept if the mean with it scores at least as well as "
    "the mean without it (arXiv:2203.05482, Recipe 1)."
)


def equal(names: Sequence[str]) -> dict[str, float]:
    """The weights of an equal-weight mean."""
    return {name: 1 / len(names) for name in names}


def greedy(candidates: Sequence[str], points: Points, objective: Objective) -> dict[str, Any]:
    """Choose the ingredients of a soup.

    Args:
        candidates: Names of checkpoints; where two have the same score, the first stays first.
        points: Evaluates, and keeps what it found; made with the objective.
        objective: Held-out score, to be raised.
    Returns:
        `rule` in words, `metrics`, `alone` (candidates in the order of trial: `name`, value, low, high), `trials`
        (after the first: `candidate`, `weights`, value, low, high, `change` against the soup before it as value, low,
        high, and whether it was `kept`), `kept` (names in order of joining), `weights` of the soup and its `value`.
    Raises:
        UserError: There is no candidate, one is named twice, or as `Points.measure`.
    """
    if not candidates or len(set(candidates)) < len(candidates):
        raise UserError(f"candidates={list(candidates)} must name at least one checkpoint, each once")

    with Progress("greedy soup", 2 * len(candidates) - 1, "point") as progress:
        alone = {name: objective.of(points.measure(f"alone-{name}", {name: 1.0}, progress)) for name in candidates}
        order = sorted(candidates, key=lambda name: -alone[name].value)
        kept, soup = [order[0]], alone[order[0]]
        trials = []
        for number, name in enumerate(order[1:], 1):
            weights = equal([*kept, name])
            trial = objective.of(points.measure(f"trial-{number}-{name}", weights, progress))
            better = trial.value >= soup.value
            trials.append(_trial(name, weights, trial, trial - soup) | {"kept": better})
            if better:
                kept, soup = [*kept, name], trial
    return {
        "rule": RULE,
        "metrics": objective.metrics,
        "alone": [{"name": name, **alone[name].report()} for name in order],
        "trials": trials,
        "kept": kept,
        "weights": equal(kept),
        "value": soup.value,
    }


def _trial(name: str, weights: dict[str, float], trial: Estimate, change: Estimate) -> dict[str, Any]:
    return {"candidate": name, "weights": weights, **trial.report(), "change": change.report()}
