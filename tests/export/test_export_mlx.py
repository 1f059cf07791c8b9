"""MLX through mlx-lm, whose silent default for RoPE's theta the check has to catch."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolpost.errors import UserError
from smolpost.export import folder
from smolpost.export.command import export
from tests.export.export_models import THETA, YARN, letters, save_checkpoint

pytest.importorskip("mlx_lm", reason="mlx-lm is in the extra smolpost[export]")
pytest.importorskip("mlx.core", reason="mlx has no build for this machine")

ASKED = letters(64, 600)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "bpe"},
        {"rope_parameters": YARN},
        {"no_rope_layers": [1, 0, 1, 1, 1]},
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
        {"dtype": torch.bfloat16},
    ],
    ids=["char", "bpe", "yarn", "nope", "untied", "bf16"],
)
def test_export_is_the_checkpoint(tmp_path, fields):
    model = save_checkpoint(tmp_path / "model", **fields)
    manifest = export("mlx", model, tmp_path / "out", asked=ASKED)
    exact = fields.get("dtype") is None
    for row in manifest["check"]["lengths"].values():
        assert row["logit_difference"] < (1e-3 if exact else row["logit_limit"])
        assert row["ours"] == row["exported"] or not exact
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_a_head_that_is_stored_alone_and_stop_tokens_arrive(tmp_path):
    model = save_checkpoint(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    manifest = export("mlx", model, tmp_path / "out", asked=letters(64))
    assert manifest["check"]["stop_tokens"]["ours"] == [7, 8]
    assert {7, 8} <= set(manifest["check"]["stop_tokens"]["exported"])


def without(key):
    """`portable_config` as stock transformers 5 writes it: one old spelling is missing."""
    complete = folder.portable_config
    return lambda source: {name: value for name, value in complete(source).items() if name != key}


@pytest.mark.parametrize(("key", "fields"), [("rope_theta", {}), ("rope_scaling", {"rope_parameters": YARN})])
def test_missing_old_spelling_is_caught(tmp_path, monkeypatch, key, fields):
    monkeypatch.setattr(folder, "portable_config", without(key))
    model = save_checkpoint(tmp_path / "model", **fields)
    with pytest.raises(UserError, match=r"the mlx export is not the checkpoint: .*logits at 600 tokens differ by"):
        export("mlx", model, tmp_path / "out", asked=ASKED)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
