"""Blends in a live model against the files that a merge writes, bit for bit."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from smolpost.errors import UserError
from smolpost.merging.average import is_finite
from smolpost.merging.checkpoint import CHUNK
from smolpost.merging.linear import merge
from smolpost.selection import live
from smolpost.selection.live import Blend, write_point
from tests.merging.checkpoints import edit_weights, save_checkpoint, weights

POINTS = [
    {"a": 0.45, "b": 0.45, "c": 0.1},
    {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
    {"c": 0.7, "a": 0.3},  # another order and fewer inputs
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """a fp32, b and c bf16; c in shards."""
    root = tmp_path_factory.mktemp("inputs")
    kinds = {"a": {}, "b": {"dtype": torch.bfloat16}, "c": {"dtype": torch.bfloat16, "shard": "10KB"}}
    return {name: save_checkpoint(root / name, seed, **kind) for seed, (name, kind) in enumerate(kinds.items())}


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def bits(tensors):
    return {name: tensor.contiguous().view(torch.uint8).tolist() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("point", POINTS)
def test_point_is_the_merged_file_bit_for_bit(inputs, point, dtype, tmp_path):
    merge([(name, inputs[name], weight) for name, weight in point.items()], "a", tmp_path / "out", dtype)
    for model_dtype in (torch.float32, getattr(torch, dtype)):
        blend = Blend(inputs, "a", model := load(inputs["a"], model_dtype), dtype)
        blend.set({"b": 1.0})  # what stood there before leaves no trace
        blend.set(point)
        assert bits(model.state_dict()) == bits(load(tmp_path / "out", model_dtype).state_dict())


@pytest.mark.parametrize("name", "abc")
def test_endpoints_are_the_inputs(inputs, name):
    blend = Blend(inputs, "a", model := load(inputs["a"]), "float32")
    blend.set({"a": 0.5, "b": 0.5})
    blend.set({other: float(other == name) for other in inputs})
    expected = {n: tensor.float() for n, tensor in weights(inputs[name]).items()}
    assert bits(dict(model.named_parameters())) == bits(expected)


def test_tied_head_stays_tied_and_buffers_stay_as_they_are(inputs):
    model = load(inputs["a"])
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    Blend(inputs, "a", model, "bfloat16").set({"b": 0.5, "c": 0.5})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert buffers and bits(buffers) == bits(dict(model.named_buffers()))


def test_untied_head_is_set(tmp_path):
    inputs = {n: save_checkpoint(tmp_path / n, i, tie_word_embeddings=False) for i, n in enumerate("ab")}
    Blend(inputs, "a", model := load(inputs["a"]), "float32").set({"b": 1.0})
    assert torch.equal(model.lm_head.weight, weights(inputs["b"])["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_refusals(inputs, tmp_path):
    model = load(inputs["a"])
    blend = Blend(inputs, "a", model, "float32")
    with pytest.raises(UserError, match="merge input 'd' is not known; choose among a, b, c"):
        blend.set({"a": 0.5, "d": 0.5})
    with pytest.raises(UserError, match=r"merge weights a=0\.5, b=0\.4 sum to 0\.9, not 1"):
        blend.set({"a": 0.5, "b": 0.4})
    with pytest.raises(UserError, match="merge dtype='int8' is not known"):
        Blend(inputs, "a", model, "int8")
    wide = save_checkpoint(tmp_path / "wide", 0, hidden_size=32)
    with pytest.raises(UserError, match=r"merge inputs 'a' and 'wide' differ in config\.json: hidden_size=16 and 32"):
        Blend({**inputs, "wide": wide}, "a", model, "float32")
    other = save_checkpoint(tmp_path / "other", 0, template="{{ 1 }}")
    with pytest.raises(UserError, match="'a' and 'other' differ in their chat template"):
        Blend({**inputs, "other": other}, "a", model, "float32")
    Blend({**inputs, "other": other}, "a", model, "float32", allow_template_change=True)
    deep = load(save_checkpoint(tmp_path / "deep", 0, num_hidden_layers=5))
    with pytest.raises(UserError, match=r"'a': tensor model.layers.4.\S+ is in the model only \(9 such\)"):
        Blend(inputs, "a", deep, "float32")


def test_refuses_what_is_not_finite(inputs, tmp_path):
    broken = save_checkpoint(tmp_path / "broken", 7)
    edit_weights(broken, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    blend = Blend({**inputs, "broken": broken}, "a", model := load(inputs["a"]), "float32")
    with pytest.raises(UserError, match=r"merge input 'broken': tensor model\.norm\.weight has NaN or infinity"):
        blend.set({"a": 0.5, "broken": 0.5})
    large = save_checkpoint(tmp_path / "large", 7)
    edit_weights(large, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    blend = Blend({"a": inputs["a"], "large": large}, "a", model, "float16")
    with pytest.raises(UserError, match=r"the mean of tensor model\.norm\.weight is beyond 65504; write another dtype"):
        blend.set({"large": 1.0})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_memory_beside_the_model_is_a_few_chunks(tmp_path, monkeypatch):
    def anonymous():
        [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon:")]
        return 1024 * int(line.split()[1])

    inputs = {name: save_checkpoint(tmp_path / name, i, vocab_size=750_000) for i, name in enumerate("ab")}
    blend = Blend(inputs, "a", load(inputs["a"]), "float32")
    blend.set({"a": 1.0})  # the model's own pages, which loading leaves to the file where it can
    seen = []
    monkeypatch.setattr(live, "is_finite", lambda values: seen.append(anonymous()) or is_finite(values))
    gc.collect()
    before = anonymous()
    blend.set({"a": 0.7, "b": 0.3})
    assert len(seen) > 90  # chunks of a 48 MB model
    assert max(seen) - before < 8 * 4 * CHUNK


def test_written_beside_other_files_and_again_after_a_kill(inputs, tmp_path):
    (tmp_path / "points").mkdir()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "left.txt").write_text("of a killed call")
    for _ in range(2):
        report = write_point({"a": 0.0, "b": 0.4, "c": 0.6}, inputs, "a", "bfloat16", tmp_path)
        assert report["inputs"] == {"a": 0.0, "b": 0.4, "c": 0.6}  # the base stays though nothing is taken of it
    assert not (tmp_path / "merged").exists() and (tmp_path / "points").is_dir()
    Blend(inputs, "a", model := load(inputs["a"]), "bfloat16").set({"b": 0.4, "c": 0.6})
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in load(tmp_path).state_dict().items())
    report = write_point({"a": 0.5, "b": 0.5, "c": 0.0}, inputs, "a", "bfloat16", tmp_path / "two")
    assert report["inputs"] == {"a": 0.5, "b": 0.5}
