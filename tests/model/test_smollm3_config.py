"""Contradicting fields are refused with field, value, limit and remedy."""

import logging
import re

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from smolpost.model import SmolLM3Config

REFUSED = [
    (dict(num_key_value_heads=3), "num_key_value_heads=3 must divide num_attention_heads=4; try [1, 2, 4]"),
    (dict(hidden_size=30), "hidden_size=30 is not a multiple of num_attention_heads=4; try 32"),
    (dict(hidden_size=20), "head size 5 (hidden_size=20 / num_attention_heads=4, or head_dim) is odd"),
    (dict(head_dim=7), "head size 7"),
    (dict(num_hidden_layers=0), "num_hidden_layers=0 must be at least 1"),
    (dict(num_key_value_heads=0), "num_key_value_heads=0 must be at least 1"),
    (dict(attention_dropout=1.0), "attention_dropout=1.0 must lie in [0, 1)"),
    (dict(pad_token_id=61), "pad_token_id=61 has no row in the embedding, whose last is 60 (vocab_size=61); set"),
    (dict(pad_token_id=-1), "pad_token_id=-1 has no row in the embedding, whose last is 60"),  # torch's: the last
    (dict(no_rope_layers=[1, 0]), "no_rope_layers has 2 entries for num_hidden_layers=4; give one per layer"),
    (dict(no_rope_layers=[1, 2, 0, 1]), "no_rope_layers holds [2]; its entries are 1 for RoPE and 0 for NoPE"),
    (
        dict(no_rope_layer_interval=0),
        "no_rope_layer_interval=0 must be at least 1; for RoPE in every layer set no_rope_l",
    ),
    (dict(use_sliding_window=True), "use_sliding_window=True needs sliding_window, which is None; set it, in tokens"),
    (dict(sliding_window=0), "sliding_window=0 must be at least 1 token, or None for no window"),
    (dict(layer_types=["full_attention"]), "layer_types has 1 entries for num_hidden_layers=4; give one per layer"),
    (
        dict(layer_types=["conv"] * 4),
        "layer_types holds ['conv']; SmolLM3 knows ['full_attention', 'sliding_attention']",
    ),
    (
        dict(layer_types=["sliding_attention"] * 4, sliding_window=3),
        "layer_types holds 'sliding_attention' but use_sliding_window=False; set use_sliding_window=True",
    ),
    (
        dict(rope_parameters=dict(rope_type="yarm", factor=2.0)),
        "rope_parameters.rope_type='yarm' is not one of ['default'",
    ),
    (
        dict(rope_scaling=dict(type="yarn")),
        "rope_parameters.factor=None must be a number of at least 1 for rope_type='yarn'",
    ),
    (dict(rope_scaling=dict(type="linear", factor=0.5)), "rope_parameters.factor=0.5 must be a number of at least 1"),
    (dict(rope_theta=0), "rope_parameters.rope_theta=0 must be a number above 0"),
    (dict(rope_theta="5e6"), "rope_parameters.rope_theta='5e6' must be a number above 0"),
    (
        dict(rope_theta=5e6, rope_parameters=dict(rope_type="default", rope_theta=2e6)),
        "rope_theta=5000000.0 and rope_parameters.rope_theta=2000000.0 differ, and some tools read only the first",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_contradictions_are_refused(tiny, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SmolLM3Config(**{**tiny, **fields})


@pytest.mark.parametrize(("vocab_size", "dropped"), [(3, "pbe"), (99, "pbe"), (128_001, "pe"), (128_002, "p")])
def test_defaults_outside_of_a_small_vocabulary_become_none(vocab_size, dropped, caplog):
    """As transformers' own tests build it; a SmolLM3-3B's special tokens mean nothing there."""
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.propagate, before = True, transformers_logger.propagate
    try:
        config = SmolLM3Config(vocab_size=vocab_size)
    finally:
        transformers_logger.propagate = before
    defaults = {"pad_token_id": 128004, "bos_token_id": 128000, "eos_token_id": 128001}
    for name, value in defaults.items():
        assert getattr(config, name) == (None if name[0] in dropped else value)
    assert f"vocab_size={vocab_size} does not hold the default " in caplog.text
    SmolLM3Config(vocab_size=128_256)
    assert caplog.text.count("does not hold") == 1


def test_stated_tokens_outside_of_the_vocabulary_are_kept_where_they_do_no_harm(tiny):
    """Vocabularies are padded and cut; only the padding has a row of the embedding to itself."""
    config = SmolLM3Config(**tiny | dict(bos_token_id=99, eos_token_id=[2, 99]))
    assert (config.bos_token_id, config.eos_token_id) == (99, [2, 99])


def test_wrong_types_are_refused_with_the_field(tiny):
    with pytest.raises(StrictDataclassFieldValidationError, match="'hidden_size' expected int, got str"):
        SmolLM3Config(**{**tiny, "hidden_size": "32"})


def test_contradictions_assigned_later_are_not_saved(tmp_path, tiny):
    config = SmolLM3Config(**tiny)
    config.num_key_value_heads = 3
    with pytest.raises(StrictDataclassClassValidationError, match="num_key_value_heads=3 must divide"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("fields", "no_rope_layers", "sliding"),
    [
        ({}, [1, 1, 1, 0], []),
        (dict(no_rope_layer_interval=2), [1, 0, 1, 0], []),
        (dict(no_rope_layer_interval=9), [1, 1, 1, 1], []),
        (dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=5), [1, 0, 1, 0], [1, 3]),
    ],
)
def test_derived_layers(tiny, fields, no_rope_layers, sliding):
    config = SmolLM3Config(**tiny, **fields)
    assert config.no_rope_layers == no_rope_layers
    assert [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"] == sliding
