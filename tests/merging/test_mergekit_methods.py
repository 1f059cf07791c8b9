"""mergekit's methods against mergekit's own runs, bit for bit, and against values by hand."""

import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from smolpost.errors import UserError
from smolpost.files import sha256
from smolpost.merging.mergekit.methods import merge_method
from tests.merging.checkpoints import edit_config, edit_weights, mean, save_adapter, save_checkpoint, weights
from tests.merging.mergekit_runs import SPARSE, WEIGHTED, same_bits, theirs

ROOT = Path(__file__).parent.parent.parent
QUERY = "model.layers.1.self_attn.q_proj.weight"

PAIR, THREE = ("pre", "a"), ("pre", "a", "b")
CASES = {  # method: inputs, parameters of inputs, parameters of all, whether it starts from "pre"
    "slerp": (PAIR, {}, {"t": 0.4}, True),
    "nuslerp": (PAIR, {"pre": {"weight": 0.7}, "a": {"weight": 0.3}}, {}, False),
    "multislerp": (THREE, {"pre": {"weight": 1.0}, **WEIGHTED}, {}, False),
    "karcher": (THREE, {}, {"max_iter": 5}, False),
    "task_arithmetic": (THREE, WEIGHTED, {"lambda": 0.9}, True),
    "ties": (THREE, SPARSE, {"normalize": True}, True),
    "dare_linear": (THREE, SPARSE, {}, True),
    "dare_ties": (THREE, SPARSE, {"rescale": False}, True),
    "della": (THREE, SPARSE, {}, True),
    "della_linear": (THREE, {"a": SPARSE["a"], "b": {**SPARSE["b"], "epsilon": 0.1}}, {}, True),
    "breadcrumbs": (THREE, SPARSE, {}, True),
    "breadcrumbs_ties": (THREE, {"a": {**SPARSE["a"], "gamma": 0.05}, "b": SPARSE["b"]}, {}, True),
    "model_stock": (THREE, {}, {}, True),
    "sce": (THREE, {}, {"select_topk": 0.5}, True),
    "nearswap": (PAIR, {}, {"t": 0.1}, True),
    "arcee_fusion": (PAIR, {}, {}, True),
    "ram": (THREE, {}, {}, True),
    "ramplus_tl": (THREE, {}, {"r": 0.2}, True),
    "linear": (THREE, {"pre": {"weight": 1.0}, **WEIGHTED}, {}, False),
}


@pytest.mark.parametrize("method", CASES)
def test_every_method_equals_mergekits_own_run(method, trained, tmp_path):
    names, own, parameters, starts = CASES[method]
    base_model = "pre" if starts else None
    inputs = [(name, trained[name], own.get(name, {})) for name in names]
    report = merge_method(
        method, inputs, "a", tmp_path / "out", "bfloat16", parameters=parameters, base_model=base_model, seed=3
    )
    models = [{"model": str(trained[name]), "parameters": own.get(name, {})} for name in names]
    config = {"merge_method": method, "models": models, "parameters": parameters, "dtype": "float32"}
    config |= {"out_dtype": "bfloat16"} | ({"base_model": str(trained["pre"])} if starts else {})
    ours = weights(tmp_path / "out")
    same_bits(ours, theirs(config, tmp_path / "theirs", seed=3))
    assert not all(torch.equal(ours[name], tensor) for name, tensor in weights(trained["a"]).items())
    assert (report["method"], report["base"], report["num_tensors"]) == (method, "a", len(ours))
    drawn = method.startswith(("dare", "della")) or method == "arcee_fusion"
    assert report["seed"] == (3 if drawn else None)


def test_all_of_mergekits_methods_are_covered():
    from mergekit.merge_methods.registry import registered_methods

    assert {method.spec.name for method in registered_methods()} == {*CASES, "passthrough"}


# ---------------------------------------------------------------- values by hand and identities


def test_slerp_is_the_point_on_the_great_circle(trained, tmp_path):
    # Shoemake 1985: sin((1 - t) phi) / sin phi x a + sin(t phi) / sin phi x b, phi the angle between the two.
    inputs = [("a", trained["a"], {}), ("b", trained["b"], {})]
    merge_method("slerp", inputs, "a", tmp_path / "out", "float32", parameters={"t": 0.3}, base_model="a")
    a, b = (weights(trained[name])[QUERY].double() for name in "ab")
    angle = math.acos((a * b).sum().item() / (a.norm() * b.norm()).item())
    expected = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    torch.testing.assert_close(weights(tmp_path / "out")[QUERY].double(), expected, rtol=1e-5, atol=1e-6)


def test_task_arithmetic_with_one_model_of_weight_one_is_that_model(trained, tmp_path):
    inputs = [("pre", trained["pre"], {}), ("a", trained["a"], {"weight": 1.0})]
    merge_method("task_arithmetic", inputs, "a", tmp_path / "out", "bfloat16", parameters={}, base_model="pre")
    # pre + (a - pre) rounds twice in fp32, which bf16 hides but for near ties: bf16 inputs differ by far more.
    for name, tensor in weights(trained["a"]).items():
        torch.testing.assert_close(weights(tmp_path / "out")[name].float(), tensor.float(), rtol=0, atol=1e-6)


def test_ties_with_density_one_and_one_model_is_task_arithmetic(trained, tmp_path):
    inputs = [("pre", trained["pre"], {}), ("a", trained["a"], {"weight": 0.6})]
    for method, parameters in (("ties", {"normalize": False}), ("task_arithmetic", {})):
        merge_method(method, inputs, "pre", tmp_path / method, "float32", parameters=parameters, base_model="pre")
    same_bits(weights(tmp_path / "ties"), weights(tmp_path / "task_arithmetic"))
    exact = mean([(trained["pre"], 0.4), (trained["a"], 0.6)])
    torch.testing.assert_close(weights(tmp_path / "ties")[QUERY].double(), exact[QUERY], rtol=0, atol=2.4e-7)


def test_model_stock_of_two_is_their_mean_moved_towards_the_start(trained, tmp_path):
    # arXiv:2403.19522: t = 2 cos / (1 + cos) of the angle between both differences from the start.
    inputs = [(name, trained[name], {}) for name in THREE]
    merge_method("model_stock", inputs, "a", tmp_path / "out", "float32", parameters={}, base_model="pre")
    pre, a, b = (weights(trained[name])[QUERY].double() for name in THREE)
    cos = torch.cosine_similarity((a - pre).view(-1), (b - pre).view(-1), dim=0)
    t = 2 * cos / (1 + cos)
    expected = t * (a + b) / 2 + (1 - t) * pre
    torch.testing.assert_close(weights(tmp_path / "out")[QUERY].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_seed_decides_what_is_drawn_and_no_generator_is_moved(trained, tmp_path):
    inputs = [("pre", trained["pre"], {}), ("a", trained["a"], {"weight": 1.0, "density": 0.5})]
    before = torch.get_rng_state()
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        out = tmp_path / name
        merge_method("dare_linear", inputs, "a", out, "float32", parameters={}, base_model="pre", seed=seed)
    assert torch.equal(before, torch.get_rng_state())
    digests = [sha256(tmp_path / name / "model.safetensors") for name in ("one", "again", "two")]
    assert digests[0] == digests[1] != digests[2]


# ---------------------------------------------------------------- what the result folder holds


def test_manifest_card_and_modes(trained, tmp_path):
    report = merge_method(
        "ties", [(name, trained[name], SPARSE.get(name, {})) for name in THREE], "b", tmp_path / "out", "bfloat16",
        parameters={}, base_model="pre",
    )  # fmt: skip
    out = tmp_path / "out"
    manifest = json.loads((out / "merge_manifest.json").read_text())
    [resolved] = manifest["resolved"]
    assert resolved["tensors"] == "all"
    assert resolved["parameters"] == {"int8_mask": False, "normalize": True, "rescale": False, "lambda": 1.0}
    assert resolved["inputs"] == {"pre": {}, **SPARSE}
    assert manifest["inputs"][1]["parameters"] == SPARSE["a"]
    for entry in manifest["inputs"]:
        expected = {file.name: sha256(file) for file in trained[entry["name"]].glob("*.safetensors")}
        assert {name: file["sha256"] for name, file in entry["files"].items()} == expected
    assert manifest["files"]["model.safetensors"]["sha256"] == sha256(out / "model.safetensors")
    assert manifest["config"]["models"][2] == {"model": "b", "parameters": SPARSE["b"]}
    assert manifest["versions"]["mergekit"] == "0.1.5"
    card = (out / "README.md").read_text()
    assert "| a | weight=0.7, density=0.5 |" in card and "mergekit's ties, from pre" in card
    assert str(tmp_path.parent) not in card + json.dumps(manifest) + json.dumps(report)
    assert (out / "chat_template.jinja").read_bytes() == (trained["b"] / "chat_template.jinja").read_bytes()
    assert "mergekit_config.yml" not in {file.name for file in out.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o666 & ~umask}
    assert list(tmp_path.iterdir()) == [out]


def test_sharded_untied_inputs_in_folders_with_marks_of_mergekits_and_a_sharded_result(tmp_path):
    a = save_checkpoint(tmp_path / "a+x@y z", 0, tie_word_embeddings=False, shard="3KB")
    b = save_checkpoint(tmp_path / "b", 1, tie_word_embeddings=False)
    inputs = [("a", a, {}), ("b", b, {})]
    settings = {"parameters": {"t": 0.5}, "base_model": "a"}
    merge_method("slerp", inputs, "b", tmp_path / "small", "float32", shard_bytes=4000, **settings)
    merge_method("slerp", inputs, "b", tmp_path / "whole", "float32", **settings)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 3
    same_bits(weights(tmp_path / "small"), weights(tmp_path / "whole"))
    assert "lm_head.weight" in weights(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_adapters_are_merged_into_their_models_first(trained, tmp_path):
    expected = save_adapter(tmp_path / "adapter", trained["a"])
    inputs = [("a", trained["a"], {}), ("lora", tmp_path / "adapter", {"weight": 0.5})]
    merge_method("task_arithmetic", inputs, "lora", tmp_path / "out", "float32", parameters={}, base_model="a")
    start, merged = weights(trained["a"]), weights(tmp_path / "out")
    for name in expected:
        halfway = (start[name].double() + expected[name].double()) / 2
        torch.testing.assert_close(merged[name].double(), halfway, rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- the same preflight


def refused_method(tmp_path, **changes):
    settings = {"method": "slerp", "base": "a", "out": tmp_path / "out", "dtype": "float32"}
    settings |= {"parameters": {"t": 0.5}, "base_model": "a", **changes}
    with pytest.raises(UserError) as caught:
        merge_method(**settings)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    return str(caught.value)


def test_the_preflight_of_the_linear_merge_holds_for_every_method(trained, edited, tmp_path):
    a, inputs = trained["a"], [("a", trained["a"], {}), ("b", edited, {})]
    assert "differ in their chat template" in refused_method(
        tmp_path, inputs=[("a", a, {}), ("other", trained["other"], {})]
    )
    assert "base_model='z' is not among the inputs a, b" in refused_method(tmp_path, inputs=inputs, base_model="z")
    assert "merge base='z' is not among the inputs" in refused_method(tmp_path, inputs=inputs, base="z")
    assert "starts from no model; drop base_model='a'" in refused_method(tmp_path, inputs=inputs, method="karcher")
    assert "are the same folder" in refused_method(tmp_path, inputs=[("a", a, {}), ("b", a, {})])
    edit_weights(edited, lambda tensors: tensors["model.norm.weight"].view(-1)[-1:].fill_(float("nan")))
    assert "tensor model.norm.weight has NaN or infinity" in refused_method(tmp_path, inputs=inputs)
    edit_weights(edited, lambda tensors: tensors.pop("model.norm.weight"))
    assert "is in 'a' and missing in 'b'" in refused_method(tmp_path, inputs=inputs)
    edit_config(edited, no_rope_layers=[1, 1, 0, 1])
    assert "no_rope_layers=[1, 1, 1, 0] and [1, 1, 0, 1]" in refused_method(tmp_path, inputs=inputs)


def test_a_result_the_dtype_cannot_hold_is_refused(trained, edited, tmp_path):
    edit_weights(edited, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    inputs = [("a", trained["a"], {}), ("b", edited, {})]
    message = refused_method(tmp_path, inputs=inputs, dtype="float16")
    assert "merge result: tensor model.norm.weight has NaN or infinity in float16 though its inputs" in message


KILLED = """
import sys, time
from pathlib import Path
from smolpost.merging import build, shards
from smolpost.merging.mergekit import mean
step = sys.argv[4]
def here():
    print("here", flush=True)
    time.sleep(60)
computed = mean._computed
def slow(plan):
    for number, item in enumerate(computed(plan)):
        if step == str(number):
            here()
        yield item
mean._computed = slow
def stopping(name):
    function = getattr(build, name)
    def call(*arguments):
        if step == name:
            here()
        return function(*arguments)
    setattr(build, name, call)
for name in ("write_config", "check_tensors", "check_model", "_write_manifest"):
    stopping(name)
from smolpost.merging.mergekit.methods import merge_method
a, b, out = map(Path, sys.argv[1:4])
inputs = [("a", a, {}), ("b", b, {})]
merge_method("slerp", inputs, "a", out, "float32", parameters={"t": 0.5}, base_model="a")
"""


LONG = [pytest.param(step, marks=pytest.mark.slow) for step in ("0", "write_config", "check_tensors")]


@pytest.mark.parametrize("step", ["20", "_write_manifest", *LONG])
def test_a_killed_merge_leaves_nothing_that_loads(step, trained, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(trained["a"]), str(trained["b"]), str(out), step]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        for line in process.stdout:
            if line == b"here\n":
                break
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    unfinished = tmp_path / ".out.making" / "out"
    assert list(tmp_path.iterdir()) == [unfinished.parent] and any(unfinished.iterdir())
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(unfinished)
    if step.isdigit():
        assert not list(unfinished.glob("*.safetensors"))
    # The next merge starts afresh.
    inputs = [("a", trained["a"], {}), ("b", trained["b"], {})]
    merge_method("slerp", inputs, "a", out, "float32", parameters={"t": 0.5}, base_model="a")
    assert list(tmp_path.iterdir()) == [out]
