"""Greedy soups by a scripted evaluation, and their trials against the file that a merge writes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from smolpost.errors import UserError
from smolpost.merging.linear import merge
from smolpost.selection.greedy import equal, greedy
from smolpost.selection.live import Blend
from smolpost.selection.measured import Objective, Points
from tests.merging.checkpoints import save_checkpoint, weights
from tests.selection.scripted import Scripted

OBJECTIVE = Objective("metrics", ["t/right"], seed=0)
ALONE = {"a": 0.6, "b": 0.8, "c": 0.7, "d": 0.7}
SOUPS = {"bc": 0.75, "bd": 0.8, "abd": 0.9}


def skill(weights):
    assert set(weights.values()) == {1 / len(weights)}
    return {"t": (ALONE | SOUPS)["".join(sorted(weights))]}


def run(folder, evaluate=None, candidates="abcd"):
    return greedy(list(candidates), Points(folder, evaluate or Scripted(skill), [OBJECTIVE]), OBJECTIVE)


def test_recipe_1(tmp_path):
    report = run(tmp_path)
    assert [entry["name"] for entry in report["alone"]] == ["b", "c", "d", "a"]  # c and d tie: as given
    assert [(t["candidate"], t["value"], t["kept"]) for t in report["trials"]] == [
        ("c", 0.75, False),  # below b alone
        ("d", 0.8, True),  # with b, not c, and not below: equal is enough
        ("a", 0.9, True),  # the worst alone, and still of use
    ]
    assert [trial["change"]["value"] for trial in report["trials"]] == pytest.approx([-0.05, 0, 0.1])
    assert report["kept"] == ["b", "d", "a"] and report["value"] == 0.9
    assert report["weights"] == {"b": 1 / 3, "d": 1 / 3, "a": 1 / 3}
    assert report["metrics"] == ["t/right"] and "2203.05482" in report["rule"]
    assert json.loads(json.dumps(report)) == report


def test_never_worse_than_the_best_candidate(tmp_path):
    report = run(tmp_path, Scripted(lambda w: {"t": 0.9 if list(w) == ["b"] else 0.3}))
    assert (report["kept"], report["weights"], report["value"]) == (["b"], {"b": 1.0}, 0.9)


def test_killed_search_goes_on(tmp_path):
    def killed(weights, folder):
        if len(weights) == 3:
            raise KeyboardInterrupt
        return Scripted(skill)(weights, folder)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, killed)
    report = run(tmp_path, evaluate := Scripted(skill))
    assert evaluate.calls == ["trial-3-a"]
    assert report == run(tmp_path / "uninterrupted")


def test_refuses_candidates_that_cannot_be(tmp_path):
    for candidates in ("", "aa"):
        with pytest.raises(UserError, match="must name at least one checkpoint, each once"):
            run(tmp_path, candidates=candidates)


def test_soup_is_the_merge_of_the_kept_ones_bit_for_bit_after_rejected_ones(tmp_path):
    inputs = {name: save_checkpoint(tmp_path / name, seed, dtype=torch.bfloat16) for seed, name in enumerate("abcd")}
    model = AutoModelForCausalLM.from_pretrained(inputs["a"], dtype=torch.float32)
    blend, last = Blend(inputs, "a", model, "float32"), {}

    def evaluate(point, folder):
        blend.set(point)
        last[tuple(point)] = {name: parameter.clone() for name, parameter in model.named_parameters()}
        return Scripted(skill)(point, folder)

    report = run(tmp_path / "points", evaluate)
    merge([(n, inputs[n], w) for n, w in report["weights"].items()], "a", tmp_path / "soup", "float32")
    trial, written = last[tuple(report["kept"])], weights(tmp_path / "soup")
    assert report["kept"] == ["b", "d", "a"] and equal("bda") == report["weights"]
    assert trial.keys() == written.keys()
    assert all(torch.equal(trial[name].view(torch.int32), written[name].view(torch.int32)) for name in written)
