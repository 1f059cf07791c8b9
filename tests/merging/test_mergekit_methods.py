"""mergekit's methods against mergekit's own runs, bit for bit, and against values by hand; YAML files as they are."""

import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from transformers import AutoModelForCausalLM

from smolpost.errors import UserError
from smolpost.files import sha256
from smolpost.merging.mergekit.methods import merge_method, merge_yaml
from tests.merging.checkpoints import TEMPLATE, edit_config, edit_weights, mean, save_adapter, save_checkpoint, weights

ROOT = Path(__file__).parent.parent.parent
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four bf16 checkpoints; "other" has another template. Tests copy before they edit."""
    root = tmp_path_factory.mktemp("trained")
    templates = {"pre": TEMPLATE, "a": TEMPLATE, "b": TEMPLATE, "other": "{{ 'c' }}"}
    return {
        name: save_checkpoint(root / name, seed, dtype=torch.bfloat16, template=template)
        for seed, (name, template) in enumerate(templates.items())
    }


@pytest.fixture
def edited(trained, tmp_path):
    """A copy of b to damage."""
    return Path(shutil.copytree(trained["b"], tmp_path / "edited"))


def theirs(config, out, seed=0):
    """What mergekit alone writes."""
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(random_seed=seed, quiet=True))
    return weights(out)


def same_bits(ours, golden):
    assert ours.keys() == golden.keys()
    for name, tensor in golden.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


PAIR, THREE = ("pre", "a"), ("pre", "a", "b")
WEIGHTED = {"a": {"weight": 0.7}, "b": {"weight": 0.4}}
SPARSE = {"a": {"weight": 0.7, "density": 0.5}, "b": {"weight": 0.4, "density": 0.7}}
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


# ---------------------------------------------------------------- YAML files


def write_yaml(file, **content):
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def merged(file, out, trained, **settings):
    """A merge of a file with the folders of those names that stand in it."""
    words = set(re.findall(r"\w+", file.read_text()))
    return merge_yaml(file, out, {name: folder for name, folder in trained.items() if name in words}, **settings)


def entries(*names, **own):
    return [{"model": name, **({"parameters": own[name]} if name in own else {})} for name in names]


def with_folders(value, trained):
    """A configuration with folders in place of names, as mergekit needs it."""
    if isinstance(value, dict):
        return {key: with_folders(item, trained) for key, item in value.items()}
    if isinstance(value, list):
        return [with_folders(item, trained) for item in value]
    return str(trained[value]) if value in trained else value


GRADIENT = {
    "t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]
}
YAMLS = {
    "gradients and filters": {
        "merge_method": "slerp", "models": entries("pre", "a"), "base_model": "pre", "parameters": GRADIENT,
        "dtype": "bfloat16",
    },
    "slices": {
        "merge_method": "slerp", "base_model": "pre", "parameters": {"t": 0.3}, "dtype": "float32",
        "out_dtype": "float16", "slices": [
            {"sources": [{"model": "pre", "layer_range": [0, 1]}, {"model": "a", "layer_range": [0, 1]}]},
            {"sources": [{"model": "pre", "layer_range": [1, 4]}, {"model": "b", "layer_range": [1, 4]}]},
        ],
    },
    "layers of two models": {
        "merge_method": "passthrough", "base_model": "a", "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]}, {"sources": [{"model": "b", "layer_range": [2, 4]}]},
        ],
    },
    "the base added by mergekit, and no dtype": {
        "merge_method": "ties", "models": entries("a", "b", **SPARSE), "base_model": "pre", "tokenizer_source": "base",
    },
    "numbers drawn in bf16": {
        "merge_method": "della", "models": entries("pre", "a", "b", **SPARSE), "base_model": "pre",
        "dtype": "bfloat16", "chat_template": "auto",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", YAMLS)
def test_yaml_equals_mergekits_own_run(case, trained, tmp_path):
    config = YAMLS[case]
    file = write_yaml(tmp_path / "merge.yml", **config)
    report = merged(file, tmp_path / "out", trained, seed=5)
    same_bits(weights(tmp_path / "out"), theirs(with_folders(config, trained), tmp_path / "theirs", seed=5))
    assert report["base"] == config["base_model"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == report["dtype"]
    # The same file with folders in place of names.
    paths = write_yaml(tmp_path / "paths.yml", **with_folders(config, trained))
    again = merge_yaml(paths, tmp_path / "again", seed=5)
    same_bits(weights(tmp_path / "again"), weights(tmp_path / "out"))
    assert again["inputs"] == report["inputs"] and str(tmp_path.parent) not in json.dumps(again)


def test_resolved_gradients_are_in_the_manifest(trained, tmp_path):
    file = write_yaml(tmp_path / "merge.yml", **YAMLS["gradients and filters"])
    resolved = merged(file, tmp_path / "out", trained)["resolved"]
    of = {name: entry["parameters"]["t"] for entry in resolved for name in entry["tensors"]}
    assert [of[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(4)] == pytest.approx([0, 0.5, 0.3, 1])
    assert [of[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert of["model.norm.weight"] == of["model.layers.2.input_layernorm.weight"] == 0.5


def test_linear_yaml_says_what_mergekit_divides_the_weights_by(trained, tmp_path):
    models = entries("a", "b", a={"weight": 3}, b={"weight": 1})
    file = write_yaml(tmp_path / "merge.yml", merge_method="linear", models=models, dtype="float32")
    report = merged(file, tmp_path / "out", trained, base="b")
    [resolved] = report["resolved"]
    assert resolved["normalized_weights"] == {"a": 0.75, "b": 0.25}
    exact = mean([(trained["a"], 0.75), (trained["b"], 0.25)])
    ours = merged(file, tmp_path / "ours", trained, base="b", engine="ours")
    assert (ours["inputs"], ours["engine"]) == ({"a": 0.75, "b": 0.25}, "ours")
    for out in ("out", "ours"):
        torch.testing.assert_close(weights(tmp_path / out)[QUERY].double(), exact[QUERY], rtol=0, atol=2.4e-7)


def refused(tmp_path, trained, settings=None, **config):
    """The one-line message of a refused YAML, which wrote nothing."""
    file = write_yaml(tmp_path / "merge.yml", **config)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        merged(file, tmp_path / "out", trained, **(settings or {}))
    assert sorted(tmp_path.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


SLERP = {"merge_method": "slerp", "models": entries("pre", "a"), "base_model": "pre", "parameters": {"t": 0.3}}
TIES = {"merge_method": "ties", "models": entries("pre", "a", "b", **WEIGHTED), "base_model": "pre"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_metod": "slerp"}, "key merge_metod in file is not one of merge_method, models"),
        ({"modules": {}}, "needs merge_method and one of models, slices and modules"),
        ({"models": None, "modules": {}}, "modules holds {}, not modules by their names"),
        ({"int8_mask": True}, "key int8_mask in file is not one of"),
        ({"pad_to_multiple_of": 8}, "random_seed; it belongs under tokenizer"),
        ({"random_seed": "seven"}, "random_seed='seven' is not a whole number"),
        ({"models": [{"model": "pre"}, {"model": "a", "revision": "main"}]}, "key revision in models is not one of"),
        ({"models": [{"model": "pre", "layer_range": [0, 3]}, {"model": "a"}]}, "not look at layer_range=[0, 3] of"),
        ({"models": [{"model": "pre", "weights": 1}]}, "key weights in models is not one of model, parameters"),
        ({"models": [{"parameters": {}}]}, "an entry of models has no model"),
        ({"models": entries("pre", "nowhere")}, "model nowhere is not a folder here and not one of pre; download it"),
        ({"merge_method": "dare"}, "merge method 'dare' is not one of mergekit's: arcee_fusion, breadcrumbs"),
        ({"parameters": {"t": 0.3, "tt": 1}}, "parameter tt is not used; it takes t here"),
        ({"parameters": {"t": "much"}}, "parameter t='much' is not a value it can have"),
        ({"parameters": {"t": [{"filtre": "mlp", "value": 1}]}}, "key filtre in a conditional value is not one of"),
        ({"parameters": {"t": [{"filter": "atn", "value": 1}, 0]}}, "parameter t mixes conditional values"),
        ({"parameters": {"t": [{"filter": "atn", "value": 1}, {"value": 0}]}}, "filter 'atn' matches no tensor's name"),
        ({"parameters": {}}, "mergekit refuses it (Missing required parameter t for"),
        ({"models": entries("pre", "a", a={"t": 1})}, "t of 'a' belongs to the whole merge, not to an input"),
        ({"models": entries("pre", "a", "b")}, "mergekit refuses it (Merge method requires exactly 2 inputs"),
        ({"base_model": None}, "merge method slerp needs base_model, the model that it starts from; name it"),
        ({"dtype": "int8", "out_dtype": "float16"}, "merge dtype='int8' is not known; choose one of float32"),
        ({"dtype": "float64"}, "merge dtype='float64' is not known; choose one of float32, bfloat16, float16"),
        ({"tokenizer": {"source": "base", "tokens": ["<x>"]}}, "tokenizer.tokens holds ['<x>'], not tokens and what"),
        ({"tokenizer": {"source": "base", "token": {}}}, "key token in tokenizer is not one of source, tokens, pad_to"),
        ({"chat_template": "chatlm"}, "merge chat_template (Invalid chat template: chatlm)"),
    ],
)  # fmt: skip
def test_yaml_that_mergekit_would_misread_is_refused(changes, message, trained, tmp_path):
    assert message in refused(tmp_path, trained, **{**SLERP, **changes})


def test_the_tokenizer_of_another_model_than_the_base(trained, tmp_path):
    file = write_yaml(tmp_path / "merge.yml", **SLERP, tokenizer_source="a")
    report = merged(file, tmp_path / "out", trained)
    assert (report["base"], report["tokenizer"], report["donated"]) == ("pre", "a", ["config"])
    message = refused(tmp_path, trained, {"base": "pre"}, **SLERP, tokenizer_source="a")
    assert "uses the tokenizer of 'a', but base='pre'; name one model for both" in message


def test_parameters_without_effect_are_named(trained, tmp_path):
    own = entries("pre", "a", **{"pre": {"weight": 1.0}, "a": {"weight": 1.0, "density": 0.5}})
    config = {"merge_method": "task_arithmetic", "models": own, "base_model": "pre", "parameters": {"t": 1}}
    unused = merge_yaml(
        write_yaml(tmp_path / "merge.yml", **config), tmp_path / "out", {"pre": trained["pre"], "a": trained["a"]}
    )["unused"]
    assert unused == [
        f"parameter {name}: task_arithmetic does not look at it" for name in ("weight of 'pre'", "density of 'a'", "t")
    ]
    # By name there is no file to keep as it is.
    inputs = [("pre", trained["pre"], {}), ("a", trained["a"], {"weight": 1.0, "density": 0.5})]
    with pytest.raises(UserError, match="merge parameter density of 'a': task_arithmetic does not look at it; drop it"):
        merge_method("task_arithmetic", inputs, "a", tmp_path / "not", "float32", parameters={}, base_model="pre")
    assert "needs base_model, the model that it starts from" in refused(
        tmp_path, trained, {"base": "a"}, **{**TIES, "base_model": None}
    )


def test_values_that_mergekit_refuses_only_while_it_computes_are_one_line(trained, tmp_path):
    inputs = {"a": {"weight": 1.0, "density": 0.9, "epsilon": 0.2}}
    config = {"merge_method": "della", "models": entries("pre", "a", **inputs), "base_model": "pre"}
    assert "mergekit cannot compute the merge (Epsilon must be chosen such that" in refused(tmp_path, trained, **config)


def layers(*ranges, **fields):
    """A passthrough of slices: (model, first layer, layer after the last)."""
    slices = [{"sources": [{"model": m, "layer_range": [first, last]}]} for m, first, last in ranges]
    return {"merge_method": "passthrough", "slices": slices, "base_model": "a", **fields}


def test_a_layer_that_moves_keeps_its_rope(trained, tmp_path):
    # Of four layers the last has no RoPE.
    stacked = layers(("a", 0, 2), ("b", 3, 4), ("a", 1, 4))
    file = write_yaml(tmp_path / "merge.yml", **stacked)
    merged(file, tmp_path / "out", trained)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["no_rope_layers"]) == (6, [1, 1, 0, 1, 1, 0])
    same_bits(weights(tmp_path / "out"), theirs(with_folders(stacked, trained), tmp_path / "theirs"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [layer.self_attn.use_rope for layer in model.model.layers] == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (layers(("a", 0, 2), ("a", 3, 5)), "layer_range=[3, 5] of 'a' is not within its 4 layers"),
        (layers(("a", 2, 2)), "layer_range=[2, 2] of 'a' is not within its 4 layers"),
        (
            {
                **SLERP,
                "models": None,
                "slices": [
                    {"sources": [{"model": "pre", "layer_range": [0, 2]}, {"model": "a", "layer_range": [2, 4]}]}
                ],
            },
            "layer 1 is merged from layers that differ in no_rope_layers (1 in layer 1 of 'pre', 0 in layer 3 of 'a')",
        ),
    ],
)
def test_slices_that_make_no_model_are_refused(config, message, trained, tmp_path):
    assert message in refused(tmp_path, trained, **config)


def test_yaml_with_a_key_twice_is_refused(trained, tmp_path):
    file = tmp_path / "merge.yml"
    file.write_text("merge_method: slerp\nmodels: []\nmerge_method: ties\n")
    with pytest.raises(UserError, match="cannot be read \\(key merge_method is repeated"):
        merged(file, tmp_path / "out", trained)


def test_linear_weights_without_a_sum_are_refused(trained, tmp_path):
    models = entries("a", "b", a={"weight": 0.5}, b={"weight": 0.4})
    config = {"merge_method": "linear", "models": models, "base_model": "a"}
    message = refused(tmp_path, trained, **config, parameters={"normalize": False})
    assert "merge weights a=0.5, b=0.4 of tensor" in message and "sum to 0.9, not 1" in message
    models = entries("a", "b", a={"weight": 0.5}, b={"weight": -0.5})
    assert "sum to 0, they cannot be divided by it" in refused(tmp_path, trained, **{**config, "models": models})
    gradient = entries("a", "b", a={"weight": [0, 1]}, b={"weight": 1})
    assert "merge engine='ours' computes a linear merge of models with one number" in refused(
        tmp_path, trained, {"engine": "ours"}, **{**config, "models": gradient}
    )


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
