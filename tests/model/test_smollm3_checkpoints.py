"""Checkpoints and configs go both ways between stock transformers and ours; the Auto classes give ours."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers.models.smollm3 import modeling_smollm3 as stock_models
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config as StockConfig

import smolpost.model as our_models
from smolpost.model import SmolLM3Config, register
from smolpost.model.register import AUTO_CLASSES

YARN = dict(rope_type="yarn", rope_theta=5e4, factor=2.0, original_max_position_embeddings=32)
FIELDS = {
    "default": {},
    "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=1e5)),
    "theta_legacy": dict(rope_theta=1e5),
    "yarn": dict(rope_parameters=YARN),
    "yarn_legacy": dict(
        rope_theta=5e4, rope_scaling=dict(type="yarn", factor=2.0, original_max_position_embeddings=32)
    ),
    "sliding": dict(use_sliding_window=True, sliding_window=7, no_rope_layers=[0, 1, 0, 1, 1]),
    "the_rest": dict(
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        attention_dropout=0.1,
        num_key_value_heads=None,
        num_labels=5,
        head_dim=16,
    ),
}


def as_read_from(config, folder, reader):
    config.save_pretrained(folder)
    return reader.from_pretrained(folder).to_dict()


def without_top_level_theta(fields):
    return {key: value for key, value in fields.items() if key != "rope_theta"}


@pytest.mark.parametrize("case", FIELDS)
def test_config_round_trips_both_ways(tmp_path, tiny, case):
    ours, stock = SmolLM3Config(**{**tiny, **FIELDS[case]}), StockConfig(**{**tiny, **FIELDS[case]})
    by_stock = as_read_from(stock, tmp_path / "stock", StockConfig)
    assert as_read_from(ours, tmp_path / "ours", StockConfig) == by_stock

    by_ours = SmolLM3Config.from_pretrained(tmp_path / "ours").to_dict()
    assert as_read_from(stock, tmp_path / "stock", SmolLM3Config) == by_ours
    assert without_top_level_theta(by_ours) == by_stock


def test_default_fields_are_stock_ones():
    assert without_top_level_theta(SmolLM3Config().to_dict()) == StockConfig().to_dict()


@pytest.mark.parametrize(("case", "theta"), [("default", 2e6), ("theta_legacy", 1e5), ("yarn", 5e4)])
def test_config_json_has_theta_where_mlx_reads_it(tmp_path, tiny, case, theta):
    SmolLM3Config(**tiny, **FIELDS[case]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == theta


def test_rope_scaling_set_later_keeps_theta_and_the_callers_dict(tmp_path, tiny):
    SmolLM3Config(**tiny, rope_theta=1e5).save_pretrained(tmp_path)
    scaling = dict(type="yarn", factor=2.0, original_max_position_embeddings=32)
    late = SmolLM3Config.from_pretrained(tmp_path, rope_scaling=scaling)
    early = SmolLM3Config(**tiny, rope_theta=1e5, rope_scaling=scaling)
    assert late.rope_parameters == early.rope_parameters
    assert late.rope_parameters["rope_type"] == "yarn"
    assert late.rope_parameters["rope_theta"] == 1e5
    assert scaling == dict(type="yarn", factor=2.0, original_max_position_embeddings=32)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=lambda auto_class: auto_class.__name__)
@pytest.mark.parametrize("case", ["yarn", "the_rest"])
def test_checkpoints_go_both_ways_and_auto_classes_give_ours(tmp_path, make_pair, tokens, auto_class, case):
    name = AUTO_CLASSES[auto_class].__name__
    stock, ours = make_pair(name=name, **FIELDS[case])
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    expected = stock(tokens)[0]

    from_stock = auto_class.from_pretrained(tmp_path / "stock")
    assert type(from_stock) is AUTO_CLASSES[auto_class]
    assert type(from_stock.config) is SmolLM3Config
    from_ours = getattr(stock_models, name).from_pretrained(tmp_path / "ours")
    assert type(from_ours).__module__.startswith("transformers.")
    for model in (from_stock, from_ours):
        torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-5, atol=1e-5)


def test_first_layers_of_a_checkpoint_load(tmp_path, make_pair, tokens):
    stock, _ = make_pair()
    stock.save_pretrained(tmp_path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    truncated = stock_models.SmolLM3ForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    torch.testing.assert_close(ours(tokens).logits, truncated(tokens).logits, rtol=1e-5, atol=1e-5)


def test_register_twice_is_register_once(tiny):
    register()
    register()
    model = transformers.AutoModelForCausalLM.from_config(SmolLM3Config(**tiny))
    assert type(model) is our_models.SmolLM3ForCausalLM
    assert type(transformers.AutoConfig.for_model("smollm3")) is SmolLM3Config


def test_stock_config_objects_still_give_stock_models(tiny):
    model = transformers.AutoModelForCausalLM.from_config(StockConfig(**tiny))
    assert type(model) is stock_models.SmolLM3ForCausalLM


STOCK_PROCESS = """
import sys, torch, transformers
folder = sys.argv[1]
tokens = torch.load(folder + "/tokens.pt")
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
assert type(model).__module__ == "transformers.models.smollm3.modeling_smollm3", type(model)
assert "smolpost" not in sys.modules
torch.save(model(tokens).logits.detach(), folder + "/logits.pt")
"""


def test_a_process_without_smolpost_reproduces_our_logits(tmp_path, make_pair, tokens):
    _, ours = make_pair(**FIELDS["yarn"], no_rope_layers=[0, 1, 1, 0])
    ours.save_pretrained(tmp_path)
    torch.save(tokens, tmp_path / "tokens.pt")
    subprocess.run([sys.executable, "-c", STOCK_PROCESS, str(tmp_path)], check=True, cwd=tmp_path, timeout=120)
    logits = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits, ours(tokens).logits, rtol=1e-5, atol=1e-5)
