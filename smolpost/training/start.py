"""What a training stage starts from, looked at before its rows are prepared."""

from pathlib import Path

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from smolpost.errors import UserError
from smolpost.model.loading import check_whole, is_quantized
from smolpost.model.positions import learned_positions
from smolpost.model.stored import CONFIG, read_config
from smolpost.schema import PACKED_ATTENTION
from smolpost.training.settings import Training


def check_start(name: str, stage: Training, start: Path, attn_implementation: str) -> dict[str, str]:
    """Refuse a checkpoint that would not load whole or cannot do what the stage asks of it: attention, context, LoRA.

    Returns:
        What `load_model` wants to know of the names of its tensors.
    Raises:
        UserError: With the remedy.
    """
    who = f"stages.{name}.init_from={stage.init_from}"
    config, renamed = check_checkpoint(who, start, attn_implementation)
    _check_context(f"stages.{name}", stage, config)
    if stage.lora.r:
        from smolpost.training.adapters import check_targets

        check_targets(name, config, stage.lora)
    return renamed


def check_checkpoint(who: str, folder: Path, attn_implementation: str) -> tuple[PreTrainedConfig, dict[str, str]]:
    """Refuse a checkpoint that is quantized, would not load whole, or whose attention is not known.

    Args:
        who: The checkpoint in messages.
    Returns:
        Its config, and what `load_model` wants to know of the names of its tensors.
    Raises:
        UserError: With the remedy.
    """
    config = read_config(folder / CONFIG, who)
    if is_quantized(config):
        raise UserError(
            f"{who} is quantized (quantization_config in {folder / CONFIG}); take the checkpoint from before "
            "quantization"
        )
    renamed = check_whole(folder, config, who)
    if attn_implementation == PACKED_ATTENTION:
        _check_packed(who, config)
    return config, renamed


def _check_context(key: str, stage: Training, config: PreTrainedConfig) -> None:
    """
    Raises:
        UserError: The stage wants positions that the model does not have, or another base of a RoPE that is not one.
    """
    name, rope = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__, getattr(config, "rope_parameters", None)
    if stage.rope_theta is not None and "rope_theta" not in (rope or {}):
        reason = "has a RoPE base for each kind of layer" if rope else "has no RoPE"
        remedy = f"; change its rope_parameters in {CONFIG} instead" if rope else ""
        raise UserError(f"{key}.rope_theta={stage.rope_theta:g}, but {name} {reason}; set it to null{remedy}")
    if (most := learned_positions(config)) is None:
        return
    learned = f"but {name} has a learned embedding for each of its {most} positions"
    if stage.max_position_embeddings is not None:
        raise UserError(f"{key}.max_position_embeddings={stage.max_position_embeddings}, {learned}; set it to null")
    if stage.max_seq_len > most:
        raise UserError(f"{key}.max_seq_len={stage.max_seq_len}, {learned}; set it to {most} or less")


def _check_packed(who: str, config: PreTrainedConfig) -> None:
    """
    Raises:
        UserError: The model's attention is more than SDPA over all earlier tokens or a sliding window of them.
    """
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not model._supports_sdpa:
        reason = "has attention that SDPA cannot compute, e.g. with a softcap or sinks"
    elif "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        reason = "attends in chunks (layer_types in its config.json has chunked_attention)"
    elif getattr(config.get_text_config(), "use_bidirectional_attention", None):
        reason = "attends to later tokens (use_bidirectional_attention in its config.json)"
    else:
        return
    remedy = "start from a checkpoint of another architecture"
    if model._supports_attention_backend:
        remedy += ", or set model.attn_implementation=eager in a pipeline without apo stages, which need packed"
    raise UserError(
        f"{who}: {model.__name__} {reason}; model.attn_implementation={PACKED_ATTENTION} does not know it: {remedy}"
    )
