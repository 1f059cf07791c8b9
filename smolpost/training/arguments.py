"""A stage's settings in the words of transformers' TrainingArguments."""

import math
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from smolpost.training.environment import Environment
from smolpost.training.settings import Training

SCHEDULERS = {
    "cosine": "cosine_with_min_lr",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}

FUSED = ("cpu", "cuda")  # devices on which torch's fused AdamW runs; elsewhere its default takes more memory and time


def training_arguments(
    stage: Training, seed: int, num_rows: int, out: Path, environment: Environment
) -> TrainingArguments:
    """The settings for `StageTrainer`, which plans its own batches; transformers sees a step as one batch of one row.

    Args:
        num_rows: Prepared rows, from which the number of steps follows.
    """
    return TrainingArguments(
        **shared_settings(stage, seed, num_rows, out, environment),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )


def shared_settings(stage: Training, seed: int, num_rows: int, out: Path, environment: Environment) -> dict[str, Any]:
    """What every engine is set to, under the names of TrainingArguments; the parameters are `training_arguments`'."""
    return {
        "output_dir": str(out),
        "run_name": out.name,  # in trackers
        "project": out.parent.name,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": environment.use_cpu,
        "bf16": environment.bf16,
        "num_train_epochs": stage.num_epochs,
        "max_steps": stage.max_steps or -1,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": SCHEDULERS[stage.lr_scheduler],
        "lr_scheduler_kwargs": _schedule(stage, num_rows),
        "warmup_steps": stage.warmup_steps or stage.warmup_ratio,  # a float below 1 is a share of all steps
        "max_grad_norm": stage.max_grad_norm,
        "optim": "adamw_torch_fused" if environment.device.type in FUSED else "adamw_torch",
        "weight_decay": stage.weight_decay,
        "adam_beta1": stage.adam_beta1,
        "adam_beta2": stage.adam_beta2,
        "adam_epsilon": stage.adam_epsilon,
        "logging_steps": stage.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it hides a loss that is NaN, and asks a GPU for it at each step
        "save_strategy": "steps",
        "save_steps": stage.save_steps,
        "save_total_limit": stage.save_total_limit,
        "report_to": list(stage.report_to),
        "disable_tqdm": True,  # the stage's run shows its steps itself
        "remove_unused_columns": False,  # the prepared columns are exactly what the collator needs
        "dataloader_pin_memory": not environment.use_cpu,
        "eval_strategy": "no",
        "ddp_find_unused_parameters": False,
        "activation_checkpointing": False,  # `activations.apply` has set the model's layers
    }


def total_steps(stage: Training, num_rows: int) -> int:
    """Optimizer steps of the whole stage."""
    return stage.max_steps or math.ceil(stage.num_epochs * math.ceil(num_rows / stage.global_batch_size))


def _schedule(stage: Training, num_rows: int) -> dict:
    if stage.lr_scheduler == "cosine":
        return {"min_lr_rate": stage.min_lr_ratio}
    if stage.lr_scheduler == "wsd":
        decay = math.ceil(total_steps(stage, num_rows) * stage.decay_ratio)
        return {"num_decay_steps": decay, "min_lr_ratio": stage.min_lr_ratio, "decay_type": "linear"}
    return {}
