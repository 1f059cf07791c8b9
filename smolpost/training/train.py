"""One training stage for one seed: prepared rows and a start checkpoint in, final weights and metrics out."""

import shutil
import time
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer

import smolpost.model  # noqa: F401  registers our SmolLM3 with the Auto classes
from smolpost.chat.render import load_template
from smolpost.errors import UserError
from smolpost.schema import TrainStage
from smolpost.training import apo, sft
from smolpost.training.arguments import shared_arguments
from smolpost.training.checkpoints import MarkWhole, last_whole, remove_broken
from smolpost.training.environment import Environment, check_ranks


def train(
    name: str,
    stage: TrainStage,
    *,
    seed: int,
    start: Path,
    prepared: Path,
    out: Path,
    attn_implementation: str,
    environment: Environment,
) -> dict:
    """Train to the end, from the last whole checkpoint in `out` where there is one.

    Args:
        name: The stage, for messages.
        start: Folder of the checkpoint to start from; APO's reference, too.
        prepared: Folder of the prepared rows.
        out: Folder for checkpoints, logs and, at the end, the final model and tokenizer.
        environment: From `environment.detect`, called before anything of accelerate.
    Returns:
        On rank 0: steps, epochs, loss first and last, seconds, the whole log; {} on other ranks.
    Raises:
        UserError: The ranks do not know of one another, the global batch does not divide over them, or the disk has
            no room for the checkpoints.
    """
    began = time.monotonic()
    rows = load_from_disk(str(prepared))
    # The arguments come first: under ZeRO-3 they make from_pretrained build sharded parameters (zero.Init).
    arguments = shared_arguments(name, stage, seed, len(rows), out, environment)
    arguments = (apo if stage.kind == "apo" else sft).config(stage, arguments)
    check_ranks(environment, arguments.world_size)
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = load_template(stage.template)
    model = load(start, stage, attn_implementation)
    check_space(name, stage, model, out)
    if stage.kind == "apo":
        reference = load(start, stage, attn_implementation)
        trainer = apo.trainer(model, reference, tokenizer, rows, arguments, [MarkWhole()])
    else:
        trainer = sft.trainer(model, tokenizer, rows, arguments, [MarkWhole()])
    resume = _resume_point(trainer, out)
    trainer.train(resume_from_checkpoint=resume)
    save(trainer, tokenizer, model, out, dtype=torch.bfloat16 if environment.bf16 else torch.float32)
    if not trainer.is_world_process_zero():
        return {}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 4),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "resumed_from": Path(resume).name if resume else None,
        "seconds": round(time.monotonic() - began, 1),
        "num_processes": environment.world_size,
        "device": "cpu" if environment.use_cpu else torch.cuda.get_device_name(),
        "precision": "bf16" if environment.bf16 else "fp32",
        "log": trainer.state.log_history,
    }


def load(start: Path, stage: TrainStage, attn_implementation: str) -> PreTrainedModel:
    """The start checkpoint in fp32 with the stage's context settings."""
    config = AutoConfig.from_pretrained(start)
    if stage.rope_theta is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": stage.rope_theta}
    if stage.max_position_embeddings is not None:
        config.max_position_embeddings = stage.max_position_embeddings
    # fp32 master weights whatever the compute precision: at APO's learning rate bf16 weights would not move.
    return AutoModelForCausalLM.from_pretrained(
        start, config=config, dtype=torch.float32, attn_implementation=attn_implementation
    )


def check_space(name: str, stage: TrainStage, model: PreTrainedModel, out: Path) -> None:
    """Refuse to start what the disk cannot hold: fp32 weights and two Adam moments per resumable checkpoint.

    One more than save_total_limit lies there while the oldest makes room, and the final weights beside them.

    Raises:
        UserError: With both sizes and the remedies.
    """
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ds_numel: sharded by ZeRO-3
    needed = 4 * parameters * (3 * (stage.save_total_limit + 1) + 1)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e9:.3g} GB for checkpoints and its disk has {free / 1e9:.3g} GB free; free some, "
            f"lower stages.{name}.save_total_limit={stage.save_total_limit}, or set run_dir=FOLDER elsewhere"
        )


def save(trainer: Trainer, tokenizer, model: PreTrainedModel, out: Path, dtype: torch.dtype) -> None:
    """The final model in `dtype`, alike under every backend, with its tokenizer and chat template."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        model.config.dtype = dtype
        model.config.use_cache = True  # training turns it off
        model.save_pretrained(out, state_dict=state)
        tokenizer.save_pretrained(out)
    trainer.accelerator.wait_for_everyone()


def _resume_point(trainer: Trainer, out: Path) -> str | None:
    if trainer.is_world_process_zero():
        for name in remove_broken(out):
            print(f"{out / name} was cut short while saving; removed", flush=True)
    trainer.accelerator.wait_for_everyone()
    checkpoint = last_whole(out)
    if checkpoint and trainer.is_world_process_zero():
        print(f"resuming from {checkpoint}", flush=True)
    return str(checkpoint) if checkpoint else None
