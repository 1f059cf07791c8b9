"""LoRA adapters as inputs of a merge: merged into their base first, or refused with the real cause and its path."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from smolpost.errors import UserError
from smolpost.merging.linear import merge
from tests.merging.checkpoints import VOCAB_SIZE, edit_weights, save_adapter, save_checkpoint, weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two fp32 checkpoints."""
    root = tmp_path_factory.mktemp("trained")
    return {name: save_checkpoint(root / name, seed) for seed, name in enumerate("ab")}


def refused(inputs, tmp_path):
    """The one-line message of a refused merge, which wrote nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        merge(inputs, inputs[0][0], tmp_path / "out", "float32")
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_adapters_are_merged_into_their_models_first(trained, tmp_path):
    expected = save_adapter(tmp_path / "adapter", trained["a"])
    inputs = [("lora", tmp_path / "adapter", 0.25), ("b", trained["b"], 0.75)]
    merge(inputs, "lora", tmp_path / "out", "float32")
    merged, other = weights(tmp_path / "out"), weights(trained["b"])
    assert merged.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(merged[name], 0.25 * expected[name] + 0.75 * other[name], rtol=1e-6, atol=1e-6)
    assert not list(tmp_path.glob(".*"))
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert manifest["inputs"][0]["files"].keys() == {
        "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
    }  # fmt: skip


def test_an_adapter_of_a_tied_head_gives_an_untied_model(trained, tmp_path):
    """Alone it is that model; with models that are tied it has no mean."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(trained["a"]), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    report = merge([("lora", tmp_path / "adapter", 1.0)], "lora", tmp_path / "out", "float32")
    assert report["num_tensors"] == len(weights(trained["a"])) + 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    tokens = torch.arange(VOCAB_SIZE)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(tokens).logits, model.eval()(tokens).logits, rtol=1e-5, atol=1e-5)
    (tmp_path / "more").mkdir()
    message = refused([("lora", tmp_path / "adapter", 0.5), ("b", trained["b"], 0.5)], tmp_path / "more")
    assert "differ in config.json: tie_word_embeddings=False and True" in message


def test_an_adapter_of_a_hub_id_takes_its_base_from_the_hubs_cache(trained, tmp_path, monkeypatch):
    expected = save_adapter(tmp_path / "adapter", trained["a"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "org/model"}))
    asked = []

    def cached(name, revision, local_files_only):
        asked.append((name, local_files_only))
        return str(trained["a"])

    monkeypatch.setattr("smolpost.merging.adapters.snapshot_download", cached)
    merge([("lora", tmp_path / "adapter", 1.0)], "lora", tmp_path / "out", "float32")
    assert set(asked) == {("org/model", True)}  # never from the network
    torch.testing.assert_close(weights(tmp_path / "out"), expected, rtol=1e-6, atol=1e-6)


def test_refuses_adapters_of_models_that_are_not_here_and_pickled_ones(trained, tmp_path):
    save_adapter(tmp_path / "adapter", trained["a"])
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "org/model"}))
    inputs = [("lora", tmp_path / "adapter", 1.0)]
    message = refused(inputs, tmp_path)
    assert "is a LoRA adapter of base_model_name_or_path='org/model', which is neither a checkpoint" in message
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    assert "is a LoRA adapter that has its weights in adapter_model.bin" in refused(inputs, tmp_path)
    (tmp_path / "adapter" / "adapter_model.bin").unlink()
    assert "is a LoRA adapter that has no adapter_model.safetensors" in refused(inputs, tmp_path)


def edit_adapter(folder, change):
    """As `edit_weights`, of an adapter."""
    file = folder / "adapter_model.safetensors"
    file.rename(folder / "model.safetensors")
    edit_weights(folder, change)
    (folder / "model.safetensors").rename(file)


def test_refusals_name_the_adapter_its_base_and_the_cause(trained, tmp_path):
    folder, inputs = tmp_path / "adapter", [("lora", tmp_path / "adapter", 1.0)]
    save_adapter(folder, trained["a"])
    first = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"

    edit_adapter(folder, lambda tensors: tensors.update({first: tensors[first][:, :3].contiguous()}))
    message = refused(inputs, tmp_path)
    assert message.startswith(f"merge input 'lora' ({folder}) is not an adapter of {trained['a']}: ")
    assert "size mismatch for base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight" in message

    edit_adapter(folder, lambda tensors: tensors.pop(first))
    assert f"merge input 'lora' ({folder}) lacks tensor {first.replace('A.', 'A.default.')} (1 such)" in refused(
        inputs, tmp_path
    )

    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["qkv_proj"]}))
    assert "Target modules {'qkv_proj'} not found in the base model" in refused(inputs, tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    assert f"{folder / 'adapter_model.safetensors'} cannot be read (" in refused(inputs, tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "NONE_SUCH"}))
    assert f"{folder / 'adapter_config.json'} cannot be read (" in refused(inputs, tmp_path)


def test_a_base_that_would_not_load_whole_is_the_cause_that_is_named(trained, tmp_path):
    base = save_checkpoint(tmp_path / "base", 0)
    save_adapter(tmp_path / "adapter", base)
    edit_weights(base, lambda tensors: tensors.pop("model.norm.weight"))
    message = refused([("lora", tmp_path / "adapter", 1.0)], tmp_path)
    assert message.startswith(f"merge input 'base model of lora' would not load whole: {base} lacks tensor model.norm")
