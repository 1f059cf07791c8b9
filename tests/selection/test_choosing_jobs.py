"""The jobs that choose a merge: points in memory, reports, and the model that they leave."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from smolpost.evaluation.tasks.recall import RecallTask
from smolpost.schema import Evaluation, Recipe
from smolpost.selection.live import Blend
from smolpost.stages.base import Planned, Work
from smolpost.stages.greedy import GreedyStage
from smolpost.stages.sft import SFTStage
from smolpost.stages.sweep import SweepStage
from tests.merging.checkpoints import save_checkpoint
from tests.selection.scripted import Scripted

pytest.importorskip("matplotlib")


@pytest.fixture
def inputs(tmp_path):
    return {name: save_checkpoint(tmp_path / name, seed) for seed, name in enumerate(("apo-1", "apo-2", "long"))}


def run(config, folder, inputs, skill, monkeypatch):
    """What was measured: the embedding's first number at each point, and the report."""
    seen = {}

    def measure(model, tokenizer, place):
        assert tokenizer.vocab_size == 10 and place.parent == folder / "points"
        seen[place.name] = model.model.embed_tokens.weight[0, 0].item()
        return Scripted(lambda _: skill(place.name))(None, place)

    monkeypatch.setattr("smolpost.selection.live.measurer", lambda *_, **__: measure)
    tasks = {name: RecallTask() for name in config.tasks_measured()}
    stages = {"apo": SFTStage(seeds=[1, 2]), "long": SFTStage(), "chosen": config}
    planned = Planned(
        name="chosen", entry="chosen", seed=None, config=config, weights=config.input_weights("chosen", stages),
        base=config.base_input(stages), data_stages=(), making=(), measuring=None,
    )  # fmt: skip
    work = Work(
        stage=planned, recipe=Recipe(stages=stages, evaluation=Evaluation(tasks=tasks)),
        inputs={name: inputs[name] for name in planned.weights}, data={},
        rows=lambda _: [], prompts=lambda _: [], folder=folder, place=folder, prepared=None, root=folder.parent,
    )  # fmt: skip
    return seen, config.make(work)


def check_model(folder, inputs, weights):
    """The folder holds the blend with these weights."""
    written = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model = AutoModelForCausalLM.from_pretrained(inputs["apo-1"])
    Blend(inputs, "apo-1", model, "float32").set(weights)
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())
    assert (folder / "tokenizer.json").is_file() and (folder / "merge_manifest.json").is_file()


def test_sweep(inputs, tmp_path, capsys, monkeypatch):
    skills = {"weight-0.0": (0.7, 0.98), "weight-0.1": (0.9, 0.97), "weight-0.5": (0.95, 0.5), "weight-1.0": (1, 0.1)}

    def skill(point):
        long, rest = skills.get(point, (0.6, 0.9))
        return {"recall": long, "reasoning": rest}

    config = SweepStage(start="apo", added="long", base="apo", weights=[0.1, 0.5])
    config.long, config.rest, folder = ["recall/right"], ["reasoning/right"], tmp_path / "sweep"
    seen, report = run(config, folder, inputs, skill, monkeypatch)
    assert list(seen) == ["weight-0.0", "weight-0.1", "weight-0.5", "weight-1.0", "alone-apo-1", "alone-apo-2"]
    assert seen["weight-0.0"] == pytest.approx((seen["alone-apo-1"] + seen["alone-apo-2"]) / 2)
    assert seen["weight-0.5"] == pytest.approx((seen["weight-0.0"] + seen["weight-1.0"]) / 2)
    assert report["picked"] == json.loads((folder / "sweep.json").read_text())["picked"] == 0.1
    assert report["merge"]["inputs"] == {"apo-1": 0.45, "apo-2": 0.45, "long": 0.1}
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    check_model(folder, inputs, {"apo-1": 0.45, "apo-2": 0.45, "long": 0.1})
    assert "picked: 0.1" in capsys.readouterr().out
    again, second = run(config, folder, inputs, skill, monkeypatch)
    assert again == {} and second["picked"] == 0.1


def test_greedy(inputs, tmp_path, capsys, monkeypatch):
    skills = {"alone-apo-1": 0.7, "alone-apo-2": 0.6, "alone-long": 0.8, "trial-1-apo-1": 0.5, "trial-2-apo-2": 0.8}
    config, folder = GreedyStage(inputs=["apo", "long"], base="apo", metrics=["t/right"]), tmp_path / "greedy"
    seen, report = run(config, folder, inputs, lambda point: {"t": skills[point]}, monkeypatch)
    assert set(seen) == set(skills)
    assert report["kept"] == json.loads((folder / "greedy.json").read_text())["kept"] == ["long", "apo-2"]
    # The base was left out of the soup and still gives its config.
    assert report["merge"]["inputs"] == {"long": 0.5, "apo-2": 0.5, "apo-1": 0.0}
    check_model(folder, inputs, {"long": 0.5, "apo-2": 0.5})
    assert "kept: long, apo-2" in capsys.readouterr().out
