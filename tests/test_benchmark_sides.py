"""The sides of a benchmark do the same work: same rows and losses, or same replies, whoever does it."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from tests.small import sum_rows

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture
def sides(monkeypatch, tmp_path):
    """Name of a benchmark and of a side -> what the side measures of toy sums."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    file = tmp_path / "rows.jsonl"
    rows = [{"messages": row["chosen"]} | row for row in sum_rows(40, 0)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    case = {
        "file": str(file), "rows": 40, "device": "cpu", "model": TINY, "vocab": 8192, "steps": 2, "length": 256,
        "batch": 4, "pack_tokens": 500, "trl_micro_batch": 2,
    }  # fmt: skip

    def measured(benchmark: str, *names: str) -> list[dict]:
        module = importlib.import_module(benchmark)
        return [module.measure(module.SIDES[name], case) for name in names]

    return measured


def test_both_engines_train_on_the_same_packs(sides):
    found = sides("sft", "smolpost", "trl", "trl, sdpa")
    assert len({side["tokens"] for side in found}) == len({side["model_flops"] for side in found}) == 1
    assert found[0]["tokens"] > 400 and 0 < found[0]["trained_share"] < 1
    for side in found:
        assert side["loss_last"] == pytest.approx(found[0]["loss_last"], rel=1e-5)


def test_both_engines_train_on_the_same_pairs(sides):
    found = sides("apo", "smolpost", "trl", "trl, precomputed")
    assert {side["pairs"] for side in found} == {8}
    for side in found:
        assert side["loss_last"] == pytest.approx(found[0]["loss_last"], rel=1e-5)
    assert found[0]["second_seed_seconds"] < found[0]["reference_seconds"]  # it is read, not scored again
    assert "second_seed_seconds" not in found[1]


def test_every_side_samples_the_same_replies(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("generation")
    case = {"model": TINY, "vocab": 256, "device": "cpu", "rows": 3, "prompt": 8, "reply": 40}
    found = [benchmark.measure(side, case) for side in benchmark.SIDES]
    assert {side["tokens"] for side in found} == {120}
    assert len({side["checksum"] for side in found}) == 1


def test_targets_of_one_gpu_are_judged_by_the_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    sides = {"a": {"rate": 30.0, "peak_gpu_gb": 50.1}, "b": {"rate": 25.0}, "c": {"failed": "CUDA out of memory"}}
    verdicts = [
        gpu.Target("a", "rate", 30).verdict(sides),
        gpu.Target("a", "rate", 1.3, than="b").verdict(sides),
        gpu.Target("a", "peak_gpu_gb", 50.0).verdict(sides),
        gpu.Target("a", "rate", 2, than="c").verdict(sides),
    ]
    assert [v["verdict"] for v in verdicts] == ["met", "missed", "missed", "not measured"]
    assert verdicts[1]["found"] == pytest.approx(1.2) and verdicts[1]["target"] == "1.3 x b"
    assert gpu.median([{"rate": 1.0}, {"rate": 3.0}, {"rate": 9.0}]) == {"rate": 3.0}


def test_every_side_on_one_gpu_trains_the_same_rows(sides, monkeypatch, tmp_path):
    """LoRA, too, which trains adapters alone: its matrices need fewer operations, and the loss falls otherwise."""
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "SMALL", TINY)
    (folder := tmp_path / "gsm8k").mkdir()
    (tmp_path / "rows.jsonl").rename(folder / "smoltalk2_sft.jsonl")
    case = gpu.cases(tmp_path, "cpu", quick=True)["SFT, packs of 16,384"]
    case = case._replace(case=case.case | {"length": 256})
    found = {name: gpu.run(case, side) for name, side in case.sides.items() if not side.liger}
    assert len({numbers["tokens"] for numbers in found.values()}) == 1
    adapters = found.pop(gpu.LORA)
    for numbers in found.values():
        assert numbers["loss_last"] == pytest.approx(found["smolpost"]["loss_last"], rel=1e-5)
    assert adapters["model_flops"] != found["smolpost"]["model_flops"]
    assert adapters["loss_last"] != pytest.approx(found["smolpost"]["loss_last"], rel=1e-5)
