"""What a training stage starts from, looked at before its rows are prepared."""

from pathlib import Path

from smolpost.errors import UserError
from smolpost.model.loading import check_whole, is_quantized
from smolpost.model.stored import CONFIG, read_config
from smolpost.schema import TrainStage


def check_start(name: str, stage: TrainStage, start: Path) -> dict[str, str]:
    """Refuse a checkpoint that would not load whole, and LoRA targets that it does not have.

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
    if stage.lora.r:
        from smolpost.training.adapters import check_targets

        check_targets(name, config, stage.lora)
    return renamed
