"""GGUF: refusals need no llama.cpp; the rest converts and runs in it, where it is there."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolpost.errors import UserError
from smolpost.export import to_gguf
from smolpost.export.command import check_format, export
from smolpost.export.folder import ExportSource
from tests.export.export_models import THETA, YARN, letters, save_checkpoint

ASKED = letters(64, 600)
LLAMA_CPP = Path(os.environ.get(to_gguf.FOLDER_VARIABLE, ""))


def with_llama_cpp():
    if not (LLAMA_CPP / to_gguf.SCRIPT).is_file():
        pytest.skip(f"{to_gguf.FOLDER_VARIABLE} names no folder with {to_gguf.SCRIPT}")
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is in the extra smolpost[gguf]")


@pytest.mark.parametrize("layers", [[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
def test_other_nope_patterns_are_refused(tmp_path, layers):
    source = ExportSource(save_checkpoint(tmp_path / "model", no_rope_layers=layers))
    found = [i for i, uses_rope in enumerate(layers) if not uses_rope]
    with pytest.raises(UserError) as error:
        check_format("gguf", source)
    assert f"NoPE in layers {found} (from 0), and llama.cpp always in [3], every fourth" in str(error.value)
    assert str(error.value).endswith("; export it as onnx or mlx or vllm-config")


def test_what_llama_cpp_leaves_out_is_refused(tmp_path):
    for field in ("attention_bias", "mlp_bias"):
        source = ExportSource(save_checkpoint(tmp_path / field, **{field: True}))
        with pytest.raises(UserError, match=f"{field}=True is not in llama.cpp"):
            check_format("gguf", source)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": THETA}
    source = ExportSource(save_checkpoint(tmp_path / "dynamic", rope_parameters=dynamic))
    with pytest.raises(UserError, match=r"rope_type=dynamic is not in llama.cpp's .*; export it as mlx or vllm"):
        check_format("gguf", source)


def test_converter_is_asked_for_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv(to_gguf.FOLDER_VARIABLE, raising=False)
    with pytest.raises(UserError, match="give its folder as --llama-cpp FOLDER or LLAMA_CPP=FOLDER"):
        to_gguf.converter_folder(None)
    with pytest.raises(UserError, match=r"has no convert_hf_to_gguf\.py"):
        to_gguf.converter_folder(tmp_path)
    (tmp_path / to_gguf.SCRIPT).write_text("")
    monkeypatch.setenv(to_gguf.FOLDER_VARIABLE, str(tmp_path))
    assert to_gguf.converter_folder(None) == tmp_path


def test_pre_tokenizer_is_read_from_the_tokenizer(tmp_path):
    char, bpe = (ExportSource(save_checkpoint(tmp_path / kind, kind=kind)) for kind in ("char", "bpe"))
    assert to_gguf.pre_tokenizer(char) == "none"
    assert to_gguf.pre_tokenizer(bpe) == "gpt-2"
    file = bpe.folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for pattern, expected in ((to_gguf.LLAMA3_PATTERN, "llama-bpe"), (r"\s+", "known")):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}
        file.write_text(json.dumps(tokenizer))
        assert to_gguf.pre_tokenizer(bpe) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "bpe"},
        {"rope_parameters": YARN},
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
        {"dtype": torch.bfloat16},
    ],
    ids=["char", "bpe", "yarn", "untied", "bf16"],
)
def test_export_is_the_checkpoint(tmp_path, fields):
    with_llama_cpp()
    model = save_checkpoint(tmp_path / "model", **fields)
    manifest = export("gguf", model, tmp_path / "out", asked=ASKED, llama_cpp=LLAMA_CPP)
    exact = fields.get("dtype") is None
    for row in manifest["check"]["lengths"].values():
        assert row["logit_difference"] < (1e-3 if exact else row["logit_limit"])
    carried = not any("has no tokenizer" in note for note in manifest["check"]["notes"])
    assert carried is (fields.get("kind") == "bpe")


@pytest.mark.slow
def test_stop_tokens_that_the_file_cannot_name_are_told(tmp_path):
    """llama.cpp stops at the tokenizer's eos_token and at what it knows by its text, <|end_of_text|> among them."""
    with_llama_cpp()
    model = save_checkpoint(tmp_path / "model", kind="bpe")
    names = ["<|im_end|>", "<|end_of_text|>", "<|begin_of_text|>"]
    ids = ExportSource(model).tokenizer.convert_tokens_to_ids(names)
    for number, expected in (
        (2, []),
        (3, ["model.gguf: llama.cpp does not stop at <|begin_of_text|>; name it as a stop string"]),
    ):
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[:number]}))
        manifest = export("gguf", model, tmp_path / f"out-{number}", asked=letters(64), llama_cpp=LLAMA_CPP)
        assert [note for note in manifest["check"]["notes"] if "stop" in note] == expected
        assert manifest["check"]["stop_tokens"]["ours"] == ids[:number]


@pytest.mark.slow
def test_a_head_that_is_stored_alone_is_the_embedding(tmp_path):
    with_llama_cpp()
    model = save_checkpoint(tmp_path / "model", kind="bpe")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    manifest = export("gguf", model, tmp_path / "out", asked=letters(64), llama_cpp=LLAMA_CPP)
    assert manifest["check"]["failures"] == []


@pytest.mark.slow
def test_wrong_theta_is_caught(tmp_path, monkeypatch):
    with_llama_cpp()
    source = ExportSource(save_checkpoint(tmp_path / "model", kind="bpe"))
    other = ExportSource(save_checkpoint(tmp_path / "other", kind="bpe"))
    config = json.loads((other.folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10_000.0
    (other.folder / "config.json").write_text(json.dumps(config))
    convert = to_gguf.convert
    monkeypatch.setattr(to_gguf, "convert", lambda s, out, llama_cpp: convert(other, out, llama_cpp))
    assert source.config.rope_parameters["rope_theta"] == THETA
    with pytest.raises(UserError, match=r"rope\.freq_base=10000, and rope_theta=50000"):
        export("gguf", source.folder, tmp_path / "out", asked=ASKED, llama_cpp=LLAMA_CPP)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_converter_that_fails_is_one_line(tmp_path):
    with_llama_cpp()
    source = ExportSource(save_checkpoint(tmp_path / "model", kind="bpe"))
    file = source.folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="BPE pre-tokenizer was not recognized"):
        export("gguf", source.folder, tmp_path / "out", asked=ASKED, llama_cpp=LLAMA_CPP)
    assert not (tmp_path / "out").exists()
