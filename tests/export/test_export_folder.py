"""What every export carries, and that a folder is born whole or not at all."""

import json
import os
import signal

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.smollm3 import SmolLM3Config, SmolLM3ForCausalLM

from smolpost.errors import UserError
from smolpost.export.folder import ExportSource, building, carry, portable_config, stage
from smolpost.files import hashes, write_json
from tests.export.export_models import THETA, YARN, save_checkpoint


def test_config_holds_both_spellings_of_rope(tmp_path):
    source = ExportSource(save_checkpoint(tmp_path / "model", rope_parameters=YARN, max_position_embeddings=2048))
    assert "rope_theta" not in json.loads((source.folder / "config.json").read_text())
    config = portable_config(source)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"] == scaling | {"rope_theta": THETA}


def test_config_without_scaling_names_none(tmp_path):
    config = portable_config(ExportSource(save_checkpoint(tmp_path / "model", no_rope_layers=[1, 0, 1, 0, 1, 1])))
    assert config["rope_scaling"] is None
    assert config["no_rope_layers"] == [1, 0, 1, 0]  # one per layer


def test_stock_transformers_reads_the_written_config(tmp_path):
    source = ExportSource(save_checkpoint(tmp_path / "model", rope_parameters=YARN, max_position_embeddings=2048))
    folder = stage(source, tmp_path / "staged")
    ids = torch.arange(600)[None] % 100
    logits = [SmolLM3ForCausalLM.from_pretrained(path)(ids).logits for path in (source.folder, folder)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert SmolLM3Config.from_pretrained(folder).rope_parameters == YARN


def test_template_and_generation_defaults_are_carried(tmp_path):
    source = ExportSource(save_checkpoint(tmp_path / "model"))
    (tmp_path / "out").mkdir()
    carry(source, tmp_path / "out")
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source.folder / name).read_bytes()
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    # Loaders before chat_template.jinja read this key; transformers 4 knows this class and not TokenizersBackend.
    assert written["chat_template"] == (source.folder / "chat_template.jinja").read_text()
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    messages = [{"role": "user", "content": "#Kv12?"}]
    prompts = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for folder in (source.folder, tmp_path / "out")
    ]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "model_type=llama is not exported"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    ],
)
def test_incomplete_checkpoints_are_refused(tmp_path, spoil, message):
    spoil(save_checkpoint(tmp_path / "model"))
    source = ExportSource(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        _ = source.config, source.weight_files, source.tokenizer


def test_a_file_that_is_not_the_written_one_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    write_json(folder / "manifest.json", {"key": "k", "files": hashes(folder)})
    assert ExportSource(folder).weight_files
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model/model.safetensors is not the file that was written: "):
        _ = ExportSource(folder).weight_files


def test_full_folder_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(UserError, match="is not an empty folder"), building(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), building(tmp_path / "out") as work:
        (work / "out").mkdir()
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_killed_build_is_hidden_and_the_next_one_removes_it(tmp_path):
    if (child := os.fork()) == 0:
        with building(tmp_path / "out") as work:
            (work / "out").mkdir()
            (work / "out" / "config.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.making"]
    with building(tmp_path / "out") as work:
        (work / "out").mkdir()
        (work / "out" / "new").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/new"]
