"""A merge stops where its base does, and says so where the inputs differ."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, SmolLM3ForCausalLM

from smolpost.merging.checkpoint import Checkpoint
from smolpost.merging.linear import merge
from smolpost.merging.mergekit.methods import merge_method
from smolpost.merging.stop_tokens import differing, stop_token_ids
from tests.merging.checkpoints import edit_config, save_checkpoint, save_tokenizer, weights


def said(folder):
    """(eos_token_id of the config, of the generation config, the tokenizer's)."""
    config, settings = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    return config["eos_token_id"], settings["eos_token_id"], AutoTokenizer.from_pretrained(folder).eos_token


@pytest.fixture
def pair(tmp_path):
    """A model that ends turns with token 3, and one that ends texts with token 1."""
    chat, text = (save_checkpoint(tmp_path / name, seed) for seed, name in enumerate(("chat", "text")))
    edit_config(chat, eos_token_id=3)
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    return chat, text


@pytest.mark.parametrize(("base", "expected"), [("chat", (3, [3, 1], "<eos>")), ("text", (1, 1, "<eos>"))])
def test_the_result_stops_where_its_base_does_and_the_line_says_so(pair, tmp_path, capsys, base, expected):
    inputs = [("chat", pair[0], 0.9), ("text", pair[1], 0.1)]
    report = merge(inputs, base, tmp_path / "out", "float32")
    assert said(tmp_path / "out") == expected
    assert report["stop_tokens"] == {"chat": [3, 1], "text": [1]}
    assert json.loads((tmp_path / "out" / "merge_manifest.json").read_text())["stop_tokens"] == report["stop_tokens"]
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("merge inputs stop at different tokens: 'chat' at [3, 1], 'text' at [1]; the result stops ")
    assert f"where its base '{base}' does" in line


def test_mergekits_methods_say_the_same(pair, tmp_path, capsys):
    inputs = [("chat", pair[0], {}), ("text", pair[1], {})]
    merge_method("slerp", inputs, "chat", tmp_path / "out", "float32", parameters={"t": 0.5}, base_model="chat")
    assert said(tmp_path / "out") == (3, [3, 1], "<eos>")
    assert "merge inputs stop at different tokens" in capsys.readouterr().out


def test_equal_stop_tokens_in_another_order_or_file_are_no_difference(pair):
    chat, text = pair
    (text / "generation_config.json").unlink()
    assert stop_token_ids(Checkpoint("text", text)) == [1]
    edit_config(text, eos_token_id=[1, 3])
    inputs = [Checkpoint("chat", chat), Checkpoint("text", text)]
    assert differing(inputs, inputs[0]) == ""
    (chat / "generation_config.json").write_text("{}")  # stock generate never stops
    assert "'chat' at [], 'text' at [1, 3]" in differing(inputs, inputs[0])


def test_an_adapter_brings_the_token_that_it_was_trained_to_stop_at(tmp_path):
    """Its tokenizer is all it says of that: the settings are its base model's."""
    base = save_checkpoint(tmp_path / "base", 0)
    model = get_peft_model(SmolLM3ForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    merge([("lora", tmp_path / "adapter", 1.0)], "lora", tmp_path / "same", "float32")
    assert said(tmp_path / "same") == (1, 1, "<eos>")
    save_tokenizer(tmp_path / "adapter")
    file = tmp_path / "adapter" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "b"}))
    merge([("lora", tmp_path / "adapter", 1.0)], "lora", tmp_path / "out", "float32")
    assert said(tmp_path / "out") == (3, [3, 1], "b")
    assert weights(tmp_path / "out").keys() == weights(base).keys()
