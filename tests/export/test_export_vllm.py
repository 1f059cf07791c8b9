"""The folder for vLLM, SGLang and older loaders; and the command around all formats."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from smolpost.errors import UserError
from smolpost.export import command, folder, to_vllm
from smolpost.export.check import logit_difference
from smolpost.export.command import export, export_command, show
from smolpost.export.folder import ExportSource, carry
from smolpost.files import sha256
from smolpost.inference.generation import stored_stop_token_ids
from smolpost.merging.placed import place_weights
from smolpost.model import SmolLM3ForCausalLM
from tests.export.export_models import THETA, YARN, letters, save_checkpoint

ASKED = letters(600)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "bpe"},
        {"rope_parameters": YARN},
        {"no_rope_layers": [1, 0, 1, 1]},
        {"tie_word_embeddings": False},
        {"dtype": torch.bfloat16},
    ],
    ids=["char", "bpe", "yarn", "nope", "untied", "bf16"],
)
def test_old_spellings_alone_give_the_same_model(tmp_path, fields):
    model = save_checkpoint(tmp_path / "model", **fields)
    manifest = export("vllm-config", model, tmp_path / "out", asked=ASKED)
    row = manifest["check"]["lengths"][600]
    assert row["logit_difference"] < (row["logit_limit"] if "dtype" in fields else 1e-3)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("key", "fields"), [("rope_theta", {}), ("rope_scaling", {"rope_parameters": YARN})])
def test_missing_old_spelling_is_caught(tmp_path, monkeypatch, key, fields):
    complete = folder.portable_config
    monkeypatch.setattr(folder, "portable_config", lambda s: {k: v for k, v in complete(s).items() if k != key})
    model = save_checkpoint(tmp_path / "model", **fields)
    with pytest.raises(UserError, match="logits at 600 tokens differ by"):
        export("vllm-config", model, tmp_path / "out", asked=ASKED)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_head_that_is_stored_alone_becomes_the_embedding(tmp_path):
    """vLLM leaves the head of a tied model out; transformers 5 would find the embedding under its name."""
    model = save_checkpoint(tmp_path / "model")
    whole = load_file(model / "model.safetensors")
    rename(model, lambda tensors: tensors | {"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    export("vllm-config", model, tmp_path / "out", asked=ASKED)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == whole.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in whole.items())


def test_a_head_that_is_stored_alone_is_found_in_its_shard(tmp_path):
    model = save_checkpoint(tmp_path / "model")
    SmolLM3ForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    place = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    file = place["weight_map"]["model.embed_tokens.weight"]
    place["weight_map"]["lm_head.weight"] = place["weight_map"].pop("model.embed_tokens.weight")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(place))
    rename(tmp_path / "shards", lambda t: t | {"lm_head.weight": t.pop("model.embed_tokens.weight")}, file)
    (out := tmp_path / "out").mkdir()
    place_weights(tmp_path / "shards", out, link=True)
    found = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert found == index.keys() == load_file(model / "model.safetensors").keys()
    assert [file.name for file in out.glob("*.safetensors") if not file.is_symlink()] == [
        index["model.embed_tokens.weight"]
    ]


def rename(folder, change, file="model.safetensors"):
    save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})


def test_the_folder_is_read_as_vllm_reads_it(tmp_path):
    """A tied config over two matrices: transformers 5 keeps both on either side of a comparison, vLLM ties them."""
    model = save_checkpoint(tmp_path / "model")
    rename(model, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    ids = [i % 100 for i in range(64)]
    (out := tmp_path / "out").mkdir()
    to_vllm.convert(source := ExportSource(model), out)
    carry(source, out)
    session = to_vllm.VllmSession(out, source.config, 64)
    assert logit_difference(SmolLM3ForCausalLM.from_pretrained(model), session, ids) > 1
    assert session.model.get_output_embeddings().weight is session.model.get_input_embeddings().weight
    with pytest.raises(UserError):
        export("vllm-config", model, tmp_path / "export", asked=ASKED)
    rename(out, lambda tensors: {name: tensor for name, tensor in tensors.items() if "norm" not in name})
    with pytest.raises(UserError, match=r"out holds no model.layers.0.input_layernorm.weight \(9 such\)"):
        to_vllm.VllmSession(out, source.config, 64)


@pytest.mark.parametrize(
    ("settings", "eos", "stops"),
    [({"eos_token_id": [7, 8]}, 5, {7, 8}), (None, [5, 6], {5, 6}), ({"max_length": 9}, 5, set())],
)
def test_an_export_stops_where_the_checkpoint_does(tmp_path, settings, eos, stops):
    model = save_checkpoint(tmp_path / "model", eos_token_id=eos)
    (model / "generation_config.json").unlink()
    if settings:
        (model / "generation_config.json").write_text(json.dumps(settings))
    manifest = export("vllm-config", model, tmp_path / "out", asked=ASKED)
    own = ExportSource(model).tokenizer.eos_token_id  # vLLM stops at it whatever else is said
    assert {name: set(ids) for name, ids in manifest["check"]["stop_tokens"].items()} == {
        "ours": stops,
        "exported": stops | {own},
    }
    assert set(stored_stop_token_ids(tmp_path / "out")) == stops


def test_lost_stop_tokens_are_found(tmp_path, monkeypatch):
    model = save_checkpoint(tmp_path / "model")
    complete = folder.carry

    def losing(source, out):
        complete(source, out)
        (out / "generation_config.json").write_text("{}")

    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    monkeypatch.setattr(folder, "carry", losing)
    with pytest.raises(UserError, match=r"it does not stop at \S+, \S+ \(ids \[7, 8\]\), as the checkpoint does"):
        export("vllm-config", model, tmp_path / "out", asked=ASKED)


def test_manifest_says_what_was_made_of_what(tmp_path):
    model = save_checkpoint(tmp_path / "model")
    manifest = export("vllm-config", model, tmp_path / "out", asked=ASKED)
    assert json.loads((tmp_path / "out" / "export_manifest.json").read_text())["files"] == manifest["files"]
    assert manifest["format"] == "vllm-config"
    assert (manifest["rope_theta"], manifest["rope_parameters"]["rope_theta"]) == (THETA, THETA)
    assert manifest["no_rope_layers"] == [1, 1, 1, 0]
    for key, root in (("inputs", model), ("files", tmp_path / "out")):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest[key])
        for name, entry in manifest[key].items():
            assert entry == {"sha256": sha256(root / name), "bytes": (root / name).stat().st_size}
    assert str(tmp_path) not in json.dumps(manifest)
    assert {oct((tmp_path / "out" / name).stat().st_mode & 0o777) for name in manifest["files"]} == {"0o644"}


def test_command_prints_a_row_for_each_length(tmp_path, monkeypatch):
    model = save_checkpoint(tmp_path / "model")
    monkeypatch.setattr(command.check, "ask", lambda tokenizer, lengths, **_: letters(*lengths))
    console = Console(width=120, record=True)
    settings = dict(num_prompts=2, max_recall_drop=0.02, llama_cpp=None)
    assert export_command("vllm-config", model, tmp_path / "out", console, lengths=[64, 128], **settings) == 0
    text = console.export_text()
    assert "largest logit difference" in text and "recall, exported" in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("│")] == ["64", "128"]
    assert "vllm-config, float32" in text


def test_table_of_a_failed_check_is_shown_before_it_is_refused(tmp_path, monkeypatch):
    model = save_checkpoint(tmp_path / "model")
    complete = folder.portable_config
    monkeypatch.setattr(folder, "portable_config", lambda s: complete(s) | {"rope_theta": 10_000.0})
    console = Console(width=120, record=True)
    with pytest.raises(UserError, match="nothing was written"):
        export("vllm-config", model, tmp_path / "out", asked=ASKED, show=lambda report: show(console, report))
    assert "600" in console.export_text()
    assert not (tmp_path / "out").exists()


def test_default_lengths_stay_within_the_context(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(command.check, "ask", lambda tokenizer, lengths, **_: asked.extend(lengths) or letters(64))
    export("vllm-config", save_checkpoint(tmp_path / "a", max_position_embeddings=512), tmp_path / "out")
    assert asked == [256]


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx needs the package onnx; pip install 'smolpost\[export\]'"):
        export("onnx", tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"lengths": [0]}, "--lengths 0"), ({"num_prompts": 0}, "--prompts 0"), ({"max_recall_drop": 2}, "outside")],
)
def test_command_refuses_bad_settings(tmp_path, setting, message):
    settings = {"lengths": None, "num_prompts": 2, "max_recall_drop": 0.02, "llama_cpp": None} | setting
    with pytest.raises(UserError, match=message):
        export_command("vllm-config", tmp_path, tmp_path / "out", Console(), **settings)
