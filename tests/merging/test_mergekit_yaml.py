"""mergekit's YAML files, merged as they are: equal to mergekit's own runs, or refused."""

import json
import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from smolpost.errors import UserError
from smolpost.merging.mergekit.methods import merge_method, merge_yaml
from tests.merging.checkpoints import mean, weights
from tests.merging.mergekit_runs import SPARSE, WEIGHTED, same_bits, theirs

QUERY = "model.layers.1.self_attn.q_proj.weight"


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
