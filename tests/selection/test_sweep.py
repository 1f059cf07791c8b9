"""Points, objectives and the rule that picks a weight, by hand values and a scripted evaluation."""

import json
import math
import re

import numpy as np
import pytest

from smolpost.errors import UserError
from smolpost.evaluation.scores import RESAMPLES, Estimate, aggregate
from smolpost.evaluation.task import Sample
from smolpost.selection.measured import Measured, Objective, Points
from smolpost.selection.sweep import CAVEAT, choose, mixed, pareto, rule, sweep
from tests.selection.scripted import Scripted

SIDES = ({"apo-1": 0.5, "apo-2": 0.5}, {"long": 1.0})
# Weight of long -> (long, rest); what the miniature's prototype found, roughly.
CURVE = {0.0: (0.7, 0.98), 0.05: (0.78, 0.98), 0.1: (0.86, 0.96), 0.2: (0.94, 0.9), 1.0: (1.0, 0.1)}


def skill(weights):
    if len(weights) == 1 and "long" not in weights:
        return {"recall": 0.65, "reasoning": 0.95}
    long, rest = CURVE[weights["long"]]
    return {"recall": long, "reasoning": rest}


def run(folder, evaluate=None, *, weights=(0.05, 0.1, 0.2), long=("recall/right",), rest=("reasoning/right",), **rule):
    objectives = [Objective("long", long, seed=0), Objective("rest", rest, seed=0)]
    points = Points(folder, evaluate or Scripted(skill), objectives)
    return sweep(SIDES, weights, points, long=objectives[0], rest=objectives[1], **rule)


# ---------------------------------------------------------------- objectives


def measured(rows, task="t"):
    """rows: (cluster, value, weight) of the metric m, None for a sample without it."""
    samples = [Sample(str(i), {} if v is None else {"m": v}, {"m": w}, c) for i, (c, v, w) in enumerate(rows)]
    found = {task: {"scores": aggregate(samples), "samples": [vars(sample) for sample in samples]}}
    return found, samples


@pytest.mark.parametrize("seed", [0, 7])
def test_a_score_has_the_interval_that_the_evaluation_gives_it(tmp_path, seed):
    random = np.random.default_rng(0)
    rows = [(f"c{i // 3}", random.normal() if i % 7 else None, random.uniform(1, 5)) for i in range(300)]
    found, samples = measured(rows)
    found["t"]["scores"] = aggregate(samples, seed)
    objective = Objective("rest", ["t/m"], seed)
    point = Points(tmp_path, lambda *_: found, [objective]).measure("p", {"a": 1.0})
    report, score = objective.of(point).report(), found["t"]["scores"]["m"]
    known = [(v, w) for _, v, w in rows if v is not None]
    assert report["value"] == pytest.approx(sum(v * w for v, w in known) / sum(w for _, w in known), abs=1e-12)
    assert report == {key: score[key] for key in ("value", "low", "high")}
    assert point.scores["t/m"] == score
    turned = Objective("rest", ["-t/m"], seed).of(point).report()
    assert turned == pytest.approx({"value": -score["value"], "low": -score["high"], "high": -score["low"]})


def test_objective_is_the_mean_of_its_scores_and_a_minus_turns_one_round(tmp_path):
    report = run(tmp_path, rest=["reasoning/right", "-reasoning/loss"])
    first = report["points"][0]
    assert first["rest"]["value"] == pytest.approx((0.98 - 0.02) / 2)
    assert report["rest"] == ["reasoning/right", "-reasoning/loss"]


def test_scores_of_one_task_are_resampled_together_and_of_two_tasks_apart():
    """right and -loss differ by the constant 1 at every prompt: their mean is known no better than either."""
    sums = {"right": {str(i): [float(i % 2), 1.0] for i in range(400)}}
    sums["loss"] = {name: [1 - value, 1.0] for name, (value, _) in sums["right"].items()}
    found = {f"{task}/{name}": values for task in "ab" for name, values in sums.items()}
    point = Measured({name: {"value": 0.5} for name in found}, found)

    def error(*metrics):
        return Objective("rest", metrics, seed=0).of(point).standard_error

    alone = 0.5 / math.sqrt(400)
    assert error("a/right") == pytest.approx(alone, rel=0.1)
    assert error("a/right", "-a/loss") == pytest.approx(alone, rel=0.1)
    assert error("a/right", "b/right") == pytest.approx(alone / math.sqrt(2), rel=0.1)
    assert error("a/right", "a/loss") == pytest.approx(0, abs=1e-12)


def test_differences_are_paired():
    """Two points that answer all prompts but one alike: the difference is known far better than either."""
    random = np.random.default_rng(1)
    right = (random.random(200) < 0.5).astype(float)
    other = right.copy()
    other[np.flatnonzero(right)[0]] = 0.0

    def estimate(values):
        sums = {"t/m": {str(i): [v, 1.0] for i, v in enumerate(values)}}
        return Objective("rest", ["t/m"], seed=0).of(Measured({"t/m": {"value": values.mean()}}, sums))

    change = estimate(right) - estimate(other)
    assert change.value == pytest.approx(1 / 200)
    # A mean of 200 values of which one is 1: sqrt(p (1 - p) / n) with p = 1/200.
    assert change.standard_error == pytest.approx(math.sqrt(1 / 200 * 199 / 200 / 200), rel=0.1)
    assert estimate(right).standard_error == pytest.approx(math.sqrt(0.25 / 200), rel=0.1)
    assert change.report()["low"] == 0.0


def test_samples_without_the_metric_have_no_part_in_it(tmp_path):
    found, _ = measured([("a", 1.0, 1.0), ("b", None, 1.0), ("c", 0.0, 3.0)])
    objective = Objective("rest", ["t/m"], seed=0)
    point = Points(tmp_path, lambda *_: found, [objective]).measure("p", {"a": 1.0})
    assert point.sums == {"t/m": {"a": [1.0, 1.0], "c": [0.0, 3.0]}}
    assert objective.of(point).report() == {"value": 0.25, "low": 0.0, "high": 1.0}


def test_a_draw_without_a_sample_of_one_of_the_metrics_is_left_out():
    sums = {"t/m": {"a": [1.0, 1.0], "c": [0.0, 3.0]}, "t/n": {"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [1.0, 1.0]}}
    estimate = Objective("rest", ["t/m", "t/n"], seed=0).of(Measured({m: {"value": 0.5} for m in sums}, sums))
    assert 0 < np.isnan(estimate.draws).mean() < 0.1  # three times b: (1/3)^3
    assert (estimate.report()["low"], estimate.report()["high"]) == (0.5, 1.0)


def test_objectives_that_cannot_be():
    for metrics in ([], ["a/b", "a/b"], ["a/b", "-a/b"]):
        with pytest.raises(UserError, match="must name at least one score, each once, as TASK/METRIC"):
            Objective("long", metrics, seed=0)


# ---------------------------------------------------------------- the rule


def exact(value):
    """Known without error."""
    return Estimate(value, np.full(RESAMPLES, value))


def noisy(value, error):
    draws = np.random.default_rng(0).normal(value, error, RESAMPLES)
    return Estimate(value, draws)


def test_largest_long_among_those_that_cost_little():
    longs, rests = [exact(v) for v in (0.7, 0.8, 0.9, 1.0)], [exact(v) for v in (0.95, 0.94, 0.93, 0.92)]
    assert choose(longs, rests, max_cost=0.02, confident=False) == ([True, True, True, False], 2)
    assert choose(longs, rests, max_cost=0.0, confident=False) == ([True, False, False, False], 0)
    assert choose(longs, rests, max_cost=1.0, confident=False)[1] == 3


def test_tie_goes_to_the_smaller_weight_and_no_gain_to_weight_0():
    rests = [exact(0.9)] * 3
    assert choose([exact(v) for v in (0.5, 0.8, 0.8)], rests, max_cost=0.02, confident=False)[1] == 1
    assert choose([exact(v) for v in (0.8, 0.8, 0.7)], rests, max_cost=0.02, confident=False)[1] == 0


def test_within_one_standard_error_of_the_best_is_as_good():
    longs, rests = [exact(0.5), exact(0.78), noisy(0.8, 0.03)], [exact(0.9)] * 3
    assert choose(longs, rests, max_cost=0.02, confident=False)[1] == 1  # 0.02 below, the error is 0.03
    longs[2] = noisy(0.8, 0.01)
    assert choose(longs, rests, max_cost=0.02, confident=False)[1] == 2


def test_confident_needs_the_interval_within_the_cost():
    longs, rests = [exact(0.5), exact(0.9)], [exact(0.9), noisy(0.895, 0.02)]
    assert choose(longs, rests, max_cost=0.02, confident=False) == ([True, True], 1)
    assert choose(longs, rests, max_cost=0.02, confident=True) == ([True, False], 0)  # up to 0.005 + 1.96 x 0.02
    assert choose(longs, rests, max_cost=0.05, confident=True) == ([True, True], 1)


def test_weight_0_is_picked_where_everything_costs():
    longs, rests = [exact(0.1), exact(0.9)], [exact(0.9), exact(0.2)]
    assert choose(longs, rests, max_cost=0.02, confident=True) == ([True, False], 0)


def test_rule_in_words():
    assert rule(0.02, False).startswith("Allowed: weights that lose at most 0.02 of `rest` against weight 0, by their")
    assert "with 95% confidence" in rule(0.02, True)


def test_pareto_front():
    # The second is dominated by the first, the last two are one point twice.
    assert pareto([(1, 1), (1, 0.5), (0.5, 2), (2, 0), (2, 0)]) == [True, False, True, True, True]


# ---------------------------------------------------------------- a sweep


def test_points_are_mixtures_of_the_two_sides():
    assert mixed(SIDES, 0.1) == {"apo-1": 0.45, "apo-2": 0.45, "long": 0.1}
    assert mixed(({"a": 0.5, "b": 0.5}, {"b": 1.0}), 0.5) == {"a": 0.25, "b": 0.75}


def test_report(tmp_path):
    report = run(tmp_path)
    assert [point["weight"] for point in report["points"]] == [0.0, 0.05, 0.1, 0.2, 1.0]
    assert [(p["long"]["value"], p["rest"]["value"]) for p in report["points"]] == [*CURVE.values()]
    assert [p["cost"]["value"] for p in report["points"]] == pytest.approx([0, 0, 0.02, 0.08, 0.88])
    assert [p["gain"]["value"] for p in report["points"]] == pytest.approx([0, 0.08, 0.16, 0.24, 0.3])
    assert report["points"][0]["cost"] == {"value": 0, "low": 0, "high": 0}
    assert report["points"][2]["weights"] == {"apo-1": 0.45, "apo-2": 0.45, "long": 0.1}
    assert [point["allowed"] for point in report["points"]] == [True, True, True, False, False]
    assert [point["pareto"] for point in report["points"]] == [False, True, True, True, True]
    assert [point["picked"] for point in report["points"]] == [False, False, True, False, False]
    assert report["picked"] == 0.1
    assert report["points"][2]["scores"]["recall/right"]["value"] == 0.86
    assert (report["rule"], report["caveat"]) == (rule(0.02, False), CAVEAT)
    assert [(i["name"], i["long"]["value"], i["rest"]["value"]) for i in report["ingredients"]] == [
        ("apo-1", 0.65, 0.95),
        ("apo-2", 0.65, 0.95),
    ]
    assert json.loads(json.dumps(report)) == report
    assert run(tmp_path / "again") == report


def test_killed_sweep_goes_on(tmp_path, capsys):
    def killed(weights, folder):
        if weights.get("long") == 0.1:
            raise KeyboardInterrupt
        return Scripted(skill)(weights, folder)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, killed)
    assert {file.name for file in tmp_path.iterdir()} == {"weight-0.0.json", "weight-0.05.json"}
    report = run(tmp_path, evaluate := Scripted(skill))
    assert evaluate.calls == ["weight-0.1", "weight-0.2", "weight-1.0", "alone-apo-1", "alone-apo-2"]
    assert re.fullmatch(r"sweep: 7 points in \d+ s \(2 were there\)\n", capsys.readouterr().err)
    assert report == run(tmp_path / "uninterrupted")
    run(tmp_path, again := Scripted(skill))
    assert again.calls == []


def test_point_of_other_weights_is_evaluated_again(tmp_path):
    run(tmp_path)
    file = tmp_path / "weight-0.1.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"weights": {"apo-1": 0.9, "long": 0.1}}))
    run(tmp_path, evaluate := Scripted(skill))
    assert evaluate.calls == ["weight-0.1"]


def test_refusals(tmp_path):
    for weights, message in (
        ((0.1, 1.5), "weights: 1.5 is outside"),
        ((-0.1,), "weights: -0.1 is outside"),
        ((float("nan"),), "weights: nan is outside"),
        ((0.1, 0.1), "weights: 0.1 is given 2 times"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path, weights=weights)
    for cost in (-0.1, float("nan")):
        with pytest.raises(UserError, match=f"max_cost={cost:g} must be at least 0"):
            run(tmp_path, max_cost=cost)
    with pytest.raises(
        UserError, match="long: recall/wrong is not a score; choose from recall/right, recall/loss, reas"
    ):
        run(tmp_path, long=["recall/wrong"])
    with pytest.raises(UserError, match="long: recall/right is nan; choose another score"):
        run(tmp_path, lambda w, f: {"recall": {"scores": {"right": {"value": float("nan")}}, "samples": []}})
    assert not list(tmp_path.iterdir())
    run(tmp_path)
    (tmp_path / "weight-0.2.json").unlink()
    with pytest.raises(UserError, match=r"weight-0\.2\.json: recall/right was measured on other prompts than at the"):
        run(tmp_path, Scripted(skill, number=50))
