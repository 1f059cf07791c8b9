"""Two spellings of one model are equal, whoever wrote them; what changes the meaning of weights is not."""

import json

import pytest
from transformers import AutoConfig

from smolpost.merging.architecture import architecture
from smolpost.model.stored import read_config

TINY = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
TYPES = ["smollm3", "llama", "qwen3"]  # ours, and two of transformers' own
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 2.0, "original_max_position_embeddings": 32}


def read(folder, model_type, **fields):
    """The architecture that a file with these fields describes; a field of `...` is left out."""
    written = AutoConfig.for_model(model_type, **TINY, vocab_size=40, pad_token_id=0).to_dict()
    written = written | {"rope_theta": ...} | fields
    file = folder / "config.json"
    file.write_text(json.dumps({key: value for key, value in written.items() if value is not ...}, default=str))
    return architecture(read_config(file).to_dict())


THETA = {"smollm3": 2e6, "llama": 1e4, "qwen3": 1e4}
SAME = {
    "notes of tools": dict(
        unsloth_version="2025.6.1", unsloth_fixed=True, _attn_implementation_autoset=True, model_name="org/model",
        transformers_version="4.51.3", auto_map={"AutoModel": "x.Y"}, keys_to_ignore_at_inference=["past_key_values"],
    ),
    "the dtype's old name": dict(dtype=..., torch_dtype="bfloat16"),
    "the type's old name": lambda theta: dict(rope_parameters={"type": "default", "rope_theta": theta}),
    "before rope_parameters": lambda theta: dict(rope_parameters=..., rope_theta=int(theta), rope_scaling=None),
    "both": lambda theta: dict(rope_theta=theta, rope_scaling={"rope_type": "default"}),
    "of training": dict(attention_dropout=0.1, use_cache=False, initializer_range=0.1),
    "the context": dict(max_position_embeddings=77),
    "defaults left out": dict(attention_bias=..., rms_norm_eps=..., hidden_act=..., rope_parameters=...),
}  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("case", SAME)
def test_spellings_of_one_model_are_equal(tmp_path, model_type, case):
    fields = SAME[case]
    fields = fields(THETA[model_type]) if callable(fields) else fields
    assert read(tmp_path, model_type, **fields) == read(tmp_path, model_type)


@pytest.mark.parametrize("model_type", ["smollm3", "llama"])
def test_the_derived_head_size_is_the_stated_one(tmp_path, model_type):
    assert read(tmp_path, model_type, head_dim=4) == read(tmp_path, model_type, head_dim=...)
    assert read(tmp_path, model_type, head_dim=8) != read(tmp_path, model_type, head_dim=...)


@pytest.mark.parametrize("model_type", TYPES)
def test_scaling_by_its_old_names_is_equal(tmp_path, model_type):
    new = read(tmp_path, model_type, rope_parameters=YARN)
    old = {key: value for key, value in YARN.items() if key not in ("rope_type", "rope_theta")} | {"type": "yarn"}
    assert read(tmp_path, model_type, rope_parameters=..., rope_theta=5e4, rope_scaling=old) == new
    assert new != read(tmp_path, model_type, rope_parameters=YARN | {"factor": 4.0})
    assert new != read(tmp_path, model_type, rope_parameters={"rope_type": "default", "rope_theta": 5e4})


@pytest.mark.parametrize(
    "fields", [dict(rms_norm_eps=1e-5), dict(hidden_act="gelu"), dict(attention_bias=True), dict(tuned_by="someone")]
)
@pytest.mark.parametrize("model_type", TYPES)
def test_all_else_counts(tmp_path, model_type, fields):
    assert read(tmp_path, model_type, **fields) != read(tmp_path, model_type, rms_norm_eps=1e-6)


def test_rope_for_each_type_of_layer(tmp_path):
    """As in Gemma 3 and ModernBERT."""
    default = {"rope_type": "default", "rope_theta": 1e4}
    layers = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": default}
    first = architecture({"rope_parameters": layers, "model_type": "x"})
    assert architecture({"rope_parameters": layers | {"sliding_attention": default | {"type": "default"}}}) == {
        "rope_parameters": first["rope_parameters"]
    }
    other = {"sliding_attention": default | {"rope_theta": 2e4}}
    assert architecture({"rope_parameters": layers | other})["rope_parameters"] != first["rope_parameters"]
