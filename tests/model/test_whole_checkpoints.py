"""A checkpoint loads whole or is refused in a line that says how to mend it: nothing is trained or scored at random."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolpost.errors import UserError
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.model.loading import check_plain, check_whole, load_for_inference, load_model
from smolpost.model.stored import check_rope, read_json, renames
from tests.model.conftest import TINY

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tied checkpoint and its model."""
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(SmolLM3Config(**TINY)).eval()
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def spoil(saved, tmp_path):
    """Return a factory of copies: tensors changed by a function, fields of the config by keyword."""

    def make(change=lambda tensors: tensors, **fields):
        folder = shutil.copytree(saved[0], tmp_path / "copy", dirs_exist_ok=True)
        tensors = {name: tensor.clone() for name, tensor in change(load_file(folder / "model.safetensors")).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def named(rename):
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def assert_loads(folder, model, **options):
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(load_model(folder, **options)(tokens).logits, model(tokens).logits)


REFUSED = {
    "a layer's part missing": (
        without("layers.2.mlp"), {},
        "lacks tensor model.layers.2.mlp.down_proj.weight (3 such); save it with save_pretrained",
    ),
    "no head, and not tied": (
        lambda tensors: tensors, {"tie_word_embeddings": False},
        "lacks tensor lm_head.weight; set tie_word_embeddings=true in its config.json if it was trained so",
    ),
    "neither head nor embedding": (without("embed_tokens"), {}, f"lacks tensor {EMBEDDING}; save it with"),
    "a value head": (
        lambda tensors: tensors | {"v_head.weight": torch.ones(3)}, {},
        "holds tensor v_head.weight that SmolLM3ForCausalLM does not have; if the model is to go without them, load it",
    ),
    "more layers than the config": (
        lambda tensors: tensors, {"num_hidden_layers": 3, "layer_types": None, "no_rope_layers": None},
        "holds tensor model.layers.3.input_layernorm.weight (9 such) that SmolLM3ForCausalLM does not have",
    ),
    "another vocabulary": (
        lambda tensors: tensors, {"vocab_size": 62},
        f"holds tensor {EMBEDDING} with shape [61, 32] in place of [62, 32]; give it the config.json that was saved",
    ),
    "a prefix that nobody knows": (
        named(lambda name: f"policy.{name}"), {}, f"lacks tensor {EMBEDDING} (38 such) and holds tensor policy.model.",
    ),
    "adapters beside the weights": (
        lambda tensors: named(lambda name: name.replace("q_proj.", "q_proj.base_layer."))(tensors)
        | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 32)},
        {}, "merge its adapters (peft's merge_and_unload), then save it with save_pretrained",
    ),
    "a tied head of its own": (
        lambda tensors: tensors | {HEAD: tensors[EMBEDDING] + 1}, {},
        "tie_word_embeddings=true, but lm_head.weight is not model.embed_tokens.weight",
    ),
    "a model type from elsewhere": (lambda tensors: tensors, {"model_type": "none_such"}, "cannot be read ("),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_load_whole_is_refused(spoil, case):
    change, fields, message = REFUSED[case]
    folder = spoil(change, **fields)
    for load in (check_whole, load_model, load_for_inference):
        with pytest.raises(UserError) as caught:
            load(folder)
        assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


WHOLE = {
    "the head stored though tied": lambda tensors: tensors | {HEAD: tensors[EMBEDDING]},
    "the head alone": lambda tensors: without("embed_tokens")(tensors) | {HEAD: tensors[EMBEDDING]},
    "names of the model without a head": named(lambda name: name.removeprefix("model.")),
    "buffers of old versions": lambda tensors: (
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_makes_the_model_whole_loads(saved, spoil, case):
    assert_loads(spoil(WHOLE[case]), saved[1])


WRAPPED = {
    "torch.compile": named(lambda name: f"_orig_mod.{name}"),
    "of every layer": named(lambda name: name.replace("layers.1.", "layers.1._orig_mod.")),
    "DDP around it": named(lambda name: f"module._orig_mod.{name}"),
    "FSDP and checkpointing": named(
        lambda name: "_fsdp_wrapped_module." + name.replace("layers.", "layers._fsdp_wrapped_module.", 1).replace(
            ".mlp.", "._checkpoint_wrapped_module.mlp."
        )
    ),
    "peft without an adapter": named(lambda name: f"base_model.model.{name}"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_what_wrappers_put_into_names_is_removed_and_said(saved, spoil, case, tmp_path, capsys):
    folder = spoil(WRAPPED[case])
    assert_loads(folder, saved[1])
    assert f"checkpoint {folder}: tensor " in (printed := capsys.readouterr().out) and printed.count("\n") == 1
    load_model(folder).save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == saved[1].state_dict().keys() - {HEAD}
    with pytest.raises(UserError, match="give all plain names first: smolpost merge OUT"):
        check_plain(folder)


def test_names_that_would_become_one_stay_as_they_are():
    assert renames(["_orig_mod.a", "b"]) == {"_orig_mod.a": "a"}
    assert renames(["_orig_mod.a", "a"]) == {}
    assert renames(["module.a", "b"]) == {}  # a model may have a part of that name
    assert renames(["_orig_mod.a", "q.lora_A.weight"]) == {}


def test_files_that_are_not_all_there(saved, tmp_path):
    folder, model = saved
    model.save_pretrained(tmp_path / "s", max_shard_size="40KB")
    index, shards = tmp_path / "s" / "model.safetensors.index.json", sorted((tmp_path / "s").glob("model-*"))
    assert len(shards) > 2
    assert_loads(tmp_path / "s", model)

    def refused(message):
        with pytest.raises(UserError, match=message):
            check_whole(tmp_path / "s")

    text = index.read_text()
    index.unlink()
    refused(rf"has {len(shards)} shards and no model.safetensors.index.json .*; copy the index")
    index.write_text('{"metadata": {}}')
    refused("has no weight_map")
    index.write_text(text)
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-10])  # the header is whole, the last tensor is not
    refused(f"{shards[1].name} cannot be read")
    shards[1].unlink()
    refused(f"lacks {shards[1].name}, which model.safetensors.index.json names")
    shards[1].write_bytes(shards[0].read_bytes())
    refused(f"holds tensor .* twice, in {shards[0].name} and {shards[1].name}")
    save_file({"other": torch.ones(32)}, shards[1])
    refused(f"places tensor .* in {shards[1].name}, which does not hold it")
    shutil.copy(folder / "model.safetensors", tmp_path / "s")
    refused("holds both model.safetensors and model.safetensors.index.json")


def test_folders_without_a_model(saved, tmp_path):
    def refused(message):
        with pytest.raises(UserError, match=message):
            check_whole(tmp_path)

    refused("checkpoint has no config.json")
    shutil.copy(saved[0] / "config.json", tmp_path)
    refused("has neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").touch()
    refused("has its weights in pytorch_model.bin .*; only safetensors are read")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("is a LoRA adapter .*; merge it into its model first: smolpost merge OUT")
    # transformers would put the adapter on top of the weights.
    shutil.copy(saved[0] / "model.safetensors", tmp_path)
    refused("holds both a model and adapter_config.json")


def test_the_check_reads_no_weight(saved, tmp_path, monkeypatch):
    """A terabyte takes as long as a miniature: the values stay on the meta device."""
    seen = []
    monkeypatch.setattr(
        "smolpost.model.loading._refuse_parts",
        lambda model, *more: seen.extend(parameter.device.type for parameter in model.parameters()),
    )
    check_whole(saved[0])
    assert set(seen) == {"meta"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 1e4}, "rope_theta=10000.0 and rope_parameters.rope_theta=2000000.0 in .* differ"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_scaling={.*yarn.*} and rope_parameters={.*default",
        ),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5}}, "and rope_scaling.rope_theta=5 in"),
    ],
)
@pytest.mark.parametrize("model_type", ["smollm3", "llama"])  # a config of ours, and one of transformers' own
def test_spellings_of_rope_that_differ_are_refused(spoil, fields, message, model_type):
    folder = spoil(model_type=model_type, **fields)
    with pytest.raises(UserError, match=message):
        check_whole(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 2_000_000, "rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": None, "rope_theta": 2e6, "rope_scaling": None},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta": 1e6},
    ],
)
def test_spellings_of_rope_that_agree_are_read(spoil, fields):
    file = spoil(**fields) / "config.json"
    check_rope(read_json(file), file, "checkpoint")
