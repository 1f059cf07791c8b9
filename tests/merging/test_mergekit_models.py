"""Which models a mergekit file may name: other architectures, adapters, results of earlier documents, donors."""

import json
import os
import shutil

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.scripts import multimerge
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from smolpost.errors import UserError
from smolpost.merging.linear import merge
from smolpost.merging.mergekit.methods import merge_yaml
from tests.merging.checkpoints import edit_config, edit_weights, mean, save_adapter, save_model, save_tokenizer, weights
from tests.merging.test_mergekit_files import same_bits, save_llama, theirs

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
    "fullatt_block_indexes": [1],
}  # fmt: skip
ARCHITECTURES = {  # class: configuration
    "GPT2LMHeadModel": {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32},
    "Qwen2ForCausalLM": TEXT,
    "Gemma3ForCausalLM": {**TEXT, "head_dim": 4},
    "MixtralForCausalLM": {**TEXT, "num_local_experts": 2},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": {**TEXT, **ROPE}, "vision_config": QWEN_VISION},
    "Mistral3ForConditionalGeneration": {
        "text_config": {"model_type": "mistral", **TEXT, "head_dim": 4},
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8},
    },
    "SmolVLMForConditionalGeneration": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION},
}
# What mergekit 0.1.5 cannot merge as transformers 5 saves it, and what it says.
BEYOND = {
    "GPTNeoXForCausalLM": (
        {key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
        "mergekit refuses it (Tensor gpt_neox.layers.0.attention.bias required but not present",
    ),
    "Qwen2VLForConditionalGeneration": (
        {
            "text_config": {**TEXT, **ROPE},
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
        },
        "mergekit refuses it (Config Qwen2VLConfig {...} has no attribute num_hidden_layers)",
    ),
    "LlavaForConditionalGeneration": (
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
        "lacks tensor lm_head.weight",
    ),
}  # fmt: skip


def pair(folder, name, fields, dtype=torch.bfloat16):
    """Two models of one class, `a` and `b`."""
    model = getattr(transformers, name)
    for seed, place in enumerate("ab"):
        save_model(folder / place, model(model.config_class(**fields)), seed, dtype=dtype)
        save_tokenizer(folder / place)


def slerp(**keys):
    return {
        "merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}], "base_model": "a", "dtype": "float32",
        "parameters": {"t": [0, 1]}, **keys,
    }  # fmt: skip


def written(file, *documents):
    file.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return file


def refused(file, out, **settings):
    before = sorted(file.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        merge_yaml(file, out, **settings)
    assert "\n" not in str(caught.value) and sorted(file.parent.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_equal_mergekits_own_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair(tmp_path, name, ARCHITECTURES[name])
    file = written(tmp_path / "merge.yml", slerp())
    merge_yaml(file, tmp_path / "ours")
    same_bits(weights(tmp_path / "ours"), theirs(slerp(), tmp_path / "theirs"))
    # The linear merge without mergekit loads such models, too.
    merge([("a", tmp_path / "a", 0.5), ("b", tmp_path / "b", 0.5)], "a", tmp_path / "mean", "float32")


@pytest.mark.parametrize("name", BEYOND)
def test_what_mergekit_cannot_merge_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields, message = BEYOND[name]
    pair(tmp_path, name, fields)
    assert message in refused(written(tmp_path / "merge.yml", slerp()), tmp_path / "out")
    merge([("a", tmp_path / "a", 0.5), ("b", tmp_path / "b", 0.5)], "a", tmp_path / "mean", "float32")


def test_layers_of_models_that_count_them_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair(tmp_path, "GPT2LMHeadModel", ARCHITECTURES["GPT2LMHeadModel"])
    stacked = [{"sources": [{"model": name, "layer_range": [0, 3]}]} for name in "ab"]
    config = {"merge_method": "passthrough", "slices": stacked, "dtype": "float32"}
    merge_yaml(written(tmp_path / "merge.yml", config), tmp_path / "ours")
    same_bits(weights(tmp_path / "ours"), theirs(config, tmp_path / "theirs"))
    assert AutoConfig.from_pretrained(tmp_path / "ours").n_layer == 6
    for name in "ab":
        edit_config(tmp_path / name, scale_attn_by_inverse_layer_idx=True)
    message = refused(written(tmp_path / "merge.yml", config), tmp_path / "out")
    assert "but scale_attn_by_inverse_layer_idx=True goes by a layer's number; give slices that cover all" in message


def test_modules_of_a_vision_language_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair(tmp_path, "Mistral3ForConditionalGeneration", ARCHITECTURES["Mistral3ForConditionalGeneration"])
    both = [{"model": "a", "layer_range": [0, 3]}, {"model": "b", "layer_range": [0, 3]}]
    one = {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 0}}
    modules = {"text_decoder": {"slices": [{"sources": both, "parameters": {"t": 0.5}}]}}
    config = {**slerp(), "parameters": {}, "modules": modules | {"multi_modal_projector": one, "vision_tower": one}}
    del config["models"]
    merge_yaml(written(tmp_path / "merge.yml", config), tmp_path / "ours")
    same_bits(weights(tmp_path / "ours"), theirs(config, tmp_path / "theirs"))
    # Layers left out are counted where the text model's are.
    for source in both:
        source["layer_range"] = [1, 3]
    merge_yaml(written(tmp_path / "merge.yml", config), tmp_path / "fewer")
    assert json.loads((tmp_path / "fewer" / "config.json").read_text())["text_config"]["num_hidden_layers"] == 2
    slices = {**slerp(), "slices": modules["text_decoder"]["slices"]}
    del slices["models"]
    assert "mergekit refuses it (Model has multiple modules, must use modules: config" in refused(
        written(tmp_path / "merge.yml", slices), tmp_path / "out"
    )


def test_a_tensor_that_mergekit_leaves_out_is_named(tmp_path, monkeypatch):
    # mergekit's file for llama has no biases; its own result would get random ones.
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save_llama(tmp_path / name, seed, attention_bias=True)
    message = refused(written(tmp_path / "merge.yml", slerp()), tmp_path / "out")
    assert "description of LlamaForCausalLM leaves out tensor model.layers.0.self_attn.k_proj.bias (16 such)" in message
    merge([("a", tmp_path / "a", 0.5), ("b", tmp_path / "b", 0.5)], "a", tmp_path / "mean", "float32")


def test_old_names_of_tensors_and_buffers_of_gpt2(tmp_path, monkeypatch):
    # As the checkpoint of 2019 has them: no prefix, and masks among the weights.
    monkeypatch.chdir(tmp_path)
    pair(tmp_path, "GPT2LMHeadModel", ARCHITECTURES["GPT2LMHeadModel"])
    for name in "ab":
        file = tmp_path / name / "model.safetensors"
        tensors = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(3)}
        save_file({**tensors, **masks}, file, metadata={"format": "pt"})
    merge_yaml(written(tmp_path / "merge.yml", slerp()), tmp_path / "ours")
    same_bits(weights(tmp_path / "ours"), theirs(slerp(), tmp_path / "theirs"))


# ---------------------------------------------------------------- adapters


def test_an_adapter_on_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        save_llama(tmp_path / name, seed, dtype=torch.float32)
    save_adapter(tmp_path / "lora", tmp_path / "c")  # trained on another model than the file puts it on
    inputs = [{"model": "a+lora", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 0.5}}]
    config = {"merge_method": "task_arithmetic", "base_model": "a", "models": inputs, "dtype": "float32"}
    report = merge_yaml(written(tmp_path / "merge.yml", config), tmp_path / "ours")
    assert set(report["inputs"]) == {"a", "a+lora", "b"}
    golden = theirs(config, tmp_path / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    same_bits(weights(tmp_path / "ours"), golden)
    # mergekit's other spelling, and names in place of folders.
    inputs[0]["model"] = {"model": {"path": "org/model"}, "lora": "org/adapter"}
    words = {"org/model": tmp_path / "a", "org/adapter": tmp_path / "lora"}
    merge_yaml(written(tmp_path / "merge.yml", config), tmp_path / "again", words)
    same_bits(weights(tmp_path / "again"), golden)
    # Our engine merges an adapter into the model that it was trained on.
    assert "engine='ours' puts the adapter of 'a+lora' on the model that its own config names" in refused(
        written(tmp_path / "merge.yml", blend("a+lora", "b", "linear")), tmp_path / "out", engine="ours"
    )
    inputs[0]["model"] = "a+c"
    assert "c in model a+c is not an adapter (c)" in refused(written(tmp_path / "merge.yml", config), tmp_path / "out")
    inputs[0]["model"] = {"model": "a", "override_architecture": "x"}
    assert "key override_architecture in a model is not one of model, lora" in refused(
        written(tmp_path / "merge.yml", config), tmp_path / "out"
    )


# ---------------------------------------------------------------- several documents


@pytest.fixture
def llamas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        save_llama(tmp_path / name, seed)
    return tmp_path


def blend(first, second, method="nuslerp", **keys):
    models = [{"model": first, "parameters": {"weight": 0.6}}, {"model": second, "parameters": {"weight": 0.4}}]
    return {"merge_method": method, "models": models, **keys}


LAYERS = {
    "merge_method": "passthrough", "dtype": "bfloat16",
    "slices": [
        {"sources": [{"model": model, "layer_range": bounds}]}
        for model, bounds in (("first", [0, 2]), ("second", [2, 4]), ("c", [3, 4]))
    ],
}  # fmt: skip


def test_documents_are_merged_in_order(llamas):
    documents = [blend("a", "b", name="first"), blend("first", "c", "linear", name="second", dtype="float32"), LAYERS]
    file = written(llamas / "merge.yml", *documents)
    report = merge_yaml(file, llamas / "ours")
    made = [llamas / "made" / name for name in ("first", "second")]
    words = [str(file), "--out-path", str(llamas / "theirs"), "--intermediate-dir", str(llamas / "made")]
    done = CliRunner().invoke(multimerge.main, [*words, "--quiet", "--no-write-model-card"])
    assert done.exit_code == 0, done.output
    same_bits(weights(llamas / "ours"), weights(llamas / "theirs"))
    assert all(folder.is_dir() for folder in made) and not list(llamas.glob(".*"))
    stored = json.loads((llamas / "ours" / "merge_manifest.json").read_text())
    assert [made["name"] for made in stored["documents"]] == ["first", "second"]
    assert stored["documents"][1]["config"]["models"][0]["model"] == "first" and str(llamas) not in json.dumps(report)
    assert all(entry["files"]["model.safetensors"]["sha256"] for entry in stored["inputs"])


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (
            [blend("a", "b"), LAYERS],
            "document 1 has no name, so later documents cannot use its result; give it a name or put it last",
        ),
        ([blend("a", "b", name="x"), blend("a", "b")], "no later document names x, and the last one is the result"),
        ([blend("x", "b", name="y"), blend("a", "y", name="x")], "document 1: model x is not a folder here"),
        ([blend("a", "b", name="x")] * 2 + [blend("x", "c")], "document 2: name x is that of an earlier document"),
        ([blend("a", "b", name="x"), blend("x", "b", nme="y")], "document 2: key nme in file is not one of"),
        ([blend("a", "b", name="x"), blend("x", "b", method="nuslurp")], "merge method 'nuslurp' is not one of"),
        ([], "merge.yml has no merge"),
    ],
)
def test_documents_that_do_not_fit_together_are_refused(documents, message, llamas):
    assert message in refused(written(llamas / "merge.yml", *documents), llamas / "out")


def test_a_later_document_that_fails_leaves_nothing(llamas):
    edit_weights(llamas / "c", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    file = written(llamas / "merge.yml", blend("a", "b", name="x"), blend("x", "c"))
    assert "merge input 'c': tensor model.norm.weight has NaN" in refused(file, llamas / "out")


# ---------------------------------------------------------------- donors, seeds, dtypes


def test_the_first_model_is_the_donor_where_no_base_is_stated(llamas):
    for place, name in enumerate("abc"):
        edit_config(llamas / name, max_position_embeddings=100 + place)
    file = written(llamas / "merge.yml", blend("b", "c"))
    for out, base, length in (("one", None, 101), ("two", "c", 102)):
        assert merge_yaml(file, llamas / out, base=base)["base"] == (base or "b")
        assert AutoConfig.from_pretrained(llamas / out).max_position_embeddings == length
    file = written(llamas / "merge.yml", {"base_model": "c", **blend("a", "b", "linear"), "parameters": {"weight": 1}})
    assert merge_yaml(file, llamas / "three")["base"] == "c"


def test_a_seed_in_the_file_counts_where_none_is_given(llamas):
    config = blend("a", "b", "dare_linear", base_model="c", parameters={"density": 0.5})
    for out, stated, given in (("zero", None, None), ("file", 7, None), ("given", 7, 3)):
        keys = {} if stated is None else {"random_seed": stated}
        report = merge_yaml(written(llamas / "merge.yml", {**config, **keys}), llamas / out, seed=given)
        assert report["seed"] == next(seed for seed in (given, stated, 0) if seed is not None)
        golden = theirs({**config, "out_dtype": "bfloat16"}, llamas / f"theirs-{out}", random_seed=report["seed"])
        same_bits(weights(llamas / out), golden)


@pytest.mark.parametrize("method", ["arcee_fusion", "ramplus_tl"])
def test_where_mergekit_writes_float32_whatever_the_dtype_we_round_once(method, llamas):
    models = [{"model": "a"}, {"model": "b"}][: 1 if method == "arcee_fusion" else 2]
    config = {"merge_method": method, "models": models, "base_model": "c", "dtype": "bfloat16"}
    merge_yaml(written(llamas / "merge.yml", config), llamas / "ours")
    golden = theirs(config, llamas / "theirs")
    assert {tensor.dtype for tensor in golden.values()} == {torch.float32}
    same_bits(weights(llamas / "ours"), {name: tensor.bfloat16() for name, tensor in golden.items()})
    config["out_dtype"] = "bfloat16"
    same_bits(weights(llamas / "ours"), theirs(config, llamas / "stated"))


def test_inputs_of_two_dtypes_without_one_in_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_llama(tmp_path / "a", 0, dtype=torch.bfloat16)
    save_llama(tmp_path / "b", 1, dtype=torch.float16)
    report = merge_yaml(written(tmp_path / "merge.yml", blend("a", "b")), tmp_path / "ours")
    assert report["dtype"] == "float32"
    same_bits(weights(tmp_path / "ours"), theirs(blend("a", "b"), tmp_path / "theirs"))


def test_names_for_folders_and_folders_as_they_are(llamas):
    shutil.copytree(llamas / "a", llamas / "far" / "model@1+x")
    file = written(llamas / "merge.yml", blend("org/x@main", "far/model@1+x", "linear"))
    report = merge_yaml(file, llamas / "out", {"org/x@main": llamas / "b"})
    assert list(report["inputs"]) == ["org/x@main", "model@1+x"]
    exact = mean([(llamas / "b", 0.6), (llamas / "a", 0.4)])
    name = "model.norm.weight"
    torch.testing.assert_close(weights(llamas / "out")[name].double(), exact[name], rtol=1e-2, atol=1e-2)
    words = {"org/x@main": llamas / "b", "c": llamas / "c"}
    message = refused(file, llamas / "not", folders=words)
    assert f"names no model c; drop c={llamas / 'c'}, or correct its name" in message
    os.rename(llamas / "far", llamas / "away")
    message = refused(file, llamas / "not", folders={"org/x@main": llamas / "b"})
    assert "model far/model@1 is not a folder here and not one of org/x@main; download it" in message
