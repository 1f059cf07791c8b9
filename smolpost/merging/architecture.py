"""What of a configuration decides what the weights mean: the rest may differ among the inputs of a merge."""

from typing import Any

from smolpost.model.stored import rope_form

# Fields that do not change what the weights mean; the result has the base's. A field not listed here must agree.
FREE_FIELDS = {
    "max_position_embeddings",
    "use_cache",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "no_rope_layer_interval",  # says nothing beside no_rope_layers, which is filled in where a file has only this
    # Of training alone.
    "attention_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "gradient_checkpointing",
    "output_router_logits",
    "router_aux_loss_coef",
    "pretraining_tp",
    # Notes that tools leave: transformers, its JavaScript twin, unsloth, ms-swift, converters.
    "dtype",
    "torch_dtype",
    "transformers_version",
    "attn_implementation",
    "cache_implementation",
    "auto_map",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    "tokenizer_class",
    "transformers.js_config",
    "is_llama_config",
    "model_name",
    "model_max_length",
    "keys_to_ignore_at_inference",
}
NOTES = ("_", "unsloth_")  # how the names of further ones begin


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that must agree, in one spelling: two files of one model give equal dicts.

    Args:
        config: A class's `to_dict`, with its defaults filled in.
    """
    fields = {
        key: architecture(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in FREE_FIELDS and not key.startswith(NOTES) and value is not None
    }
    size, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if isinstance(size, int) and isinstance(heads, int):
        fields.setdefault("head_dim", size // heads)
    theta, scaling = fields.pop("rope_theta", None), fields.pop("rope_scaling", None)
    rope = fields.get("rope_parameters") or scaling or {}
    if rope or theta is not None:
        fields["rope_parameters"] = _rope(rope, theta)
    return fields


def _rope(rope: dict[str, Any], theta: float | None) -> dict[str, Any]:
    if rope and all(isinstance(value, dict | None) for value in rope.values()):  # for each type of layer
        return {layers: _rope(own, theta) for layers, own in rope.items() if own is not None}
    return {"rope_theta": rope.get("rope_theta", theta)} | rope_form(rope)
