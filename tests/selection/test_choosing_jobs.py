"""The jobs that choose a merge: points in memory, reports, and the model that they leave."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from smolpost.selection.live import Blend
from tests.merging.checkpoints import save_checkpoint
from tests.selection.scripted import Scripted

JOBS = Path(__file__).parent.parent.parent / "merge"
pytest.importorskip("matplotlib")


@pytest.fixture
def inputs(tmp_path):
    return {name: save_checkpoint(tmp_path / name, seed) for seed, name in enumerate(("apo-1", "apo-2", "long"))}


def run(job, config, folder, inputs, skill, **plan):
    """What was measured: the embedding's first number at each point, and the report."""
    seen = {}

    def measure(model, tokenizer, place):
        assert tokenizer.vocab_size == 10 and place.parent == folder / "points"
        seen[place.name] = model.model.embed_tokens.weight[0, 0].item()
        return Scripted(lambda _: skill(place.name), seed=config["seed"])(None, place)

    stage = SimpleNamespace(plan=SimpleNamespace(config=SimpleNamespace(**config), **plan))
    return seen, runpy.run_path(str(JOBS / job))["choose"](stage, inputs, folder, measure)


def check_model(folder, inputs, weights):
    """The folder holds the blend with these weights."""
    written = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model = AutoModelForCausalLM.from_pretrained(inputs["apo-1"])
    Blend(inputs, "apo-1", model, "float32").set(weights)
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())
    assert (folder / "tokenizer.json").is_file() and (folder / "merge_manifest.json").is_file()


def test_sweep(inputs, tmp_path, capsys):
    skills = {"weight-0.0": (0.7, 0.98), "weight-0.1": (0.9, 0.97), "weight-0.5": (0.95, 0.5), "weight-1.0": (1, 0.1)}

    def skill(point):
        long, rest = skills.get(point, (0.6, 0.9))
        return {"recall": long, "reasoning": rest}

    config = {"dtype": "float32", "seed": 3, "weights": [0.1, 0.5], "max_cost": 0.02, "confident": False}
    config |= {"long": ["recall/right"], "rest": ["reasoning/right"]}
    sides = ({"apo-1": 0.5, "apo-2": 0.5}, {"long": 1.0})
    folder = tmp_path / "sweep"
    seen, report = run("sweep.py", config, folder, inputs, skill, base="apo-1", sides=sides)
    assert list(seen) == ["weight-0.0", "weight-0.1", "weight-0.5", "weight-1.0", "alone-apo-1", "alone-apo-2"]
    assert seen["weight-0.0"] == pytest.approx((seen["alone-apo-1"] + seen["alone-apo-2"]) / 2)
    assert seen["weight-0.5"] == pytest.approx((seen["weight-0.0"] + seen["weight-1.0"]) / 2)
    written = json.loads((folder / "sweep.json").read_text())
    assert report["picked"] == written["picked"] == 0.1
    for point in written["points"]:  # one score, one interval
        for objective, metric in (("long", "recall/right"), ("rest", "reasoning/right")):
            assert point[objective] | {"n": 100} == point["scores"][metric]
    assert report["merge"]["inputs"] == {"apo-1": 0.45, "apo-2": 0.45, "long": 0.1}
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    check_model(folder, inputs, {"apo-1": 0.45, "apo-2": 0.45, "long": 0.1})
    assert "picked: 0.1" in capsys.readouterr().out
    again, second = run("sweep.py", config, folder, inputs, skill, base="apo-1", sides=sides)
    assert again == {} and second["picked"] == 0.1


def test_greedy(inputs, tmp_path, capsys):
    skills = {"alone-apo-1": 0.7, "alone-apo-2": 0.6, "alone-long": 0.8, "trial-1-apo-1": 0.5, "trial-2-apo-2": 0.8}
    config, folder = {"dtype": "float32", "seed": 3, "metrics": ["t/right"]}, tmp_path / "greedy"
    seen, report = run("greedy.py", config, folder, inputs, lambda point: {"t": skills[point]}, base="apo-1")
    assert set(seen) == set(skills)
    assert report["kept"] == json.loads((folder / "greedy.json").read_text())["kept"] == ["long", "apo-2"]
    # The base was left out of the soup and still gives its config.
    assert report["merge"]["inputs"] == {"long": 0.5, "apo-2": 0.5, "apo-1": 0.0}
    check_model(folder, inputs, {"long": 0.5, "apo-2": 0.5})
    assert "kept: long, apo-2" in capsys.readouterr().out
