"""What a training stage starts from, looked at before its rows are prepared."""

from pathlib import Path

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from smolpost.errors import UserError
from smolpost.model.loading import check_whole, is_quantized
from smolpost.model.stored import CONFIG, read_config
from smolpost.schema import PACKED_ATTENTION
from smolpost.training.settings import Training


def check_start(name: str, stage: Training, start: Path, attn_implementation: str) -> dict[str, str]:
    """Refuse a checkpoint that would load incompletely, attention that it cannot use, and unknown LoRA targets.

    Returns:
        What `load_model` wants to know of the names of its tensors.
    Raises:
        UserError: With the remedy.
    """
    who = f"stages.{name}.init_from={stage.init_from}"
    config = read_config(start / CONFIG, who)
    if is_quantized(config):
        raise UserError(
            f"{who} is quantized (quantization_config in {start / CONFIG}); take the checkpoint from before "
            "quantization"
        )
    renamed = check_whole(start, config, who)
    if attn_implementation == PACKED_ATTENTION:
        _check_packed(who, config)
    if stage.lora.r:
        from smolpost.training.adapters import check_targets

        check_targets(name, config, stage.lora)
    return renamed


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
    else:
        return
    remedy = "start from a checkpoint of another architecture"
    if model._supports_attention_backend:
        remedy += ", or set model.attn_implementation=eager in a pipeline without apo stages, which need packed"
    raise UserError(
        f"{who}: {model.__name__} {reason}; model.attn_implementation={PACKED_ATTENTION} does not know it: {remedy}"
    )
