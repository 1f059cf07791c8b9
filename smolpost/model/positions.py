"""How far a model can count."""

from transformers import PreTrainedConfig


def learned_positions(config: PreTrainedConfig) -> int | None:
    """Number of positions that a model has a learned embedding for; None where positions are rotations (RoPE) or
    biases, which have no end."""
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None):
        return None
    return getattr(text, "max_position_embeddings", None)
