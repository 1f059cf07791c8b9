"""One training stage for one seed: prepared rows and a start checkpoint in, final weights and metrics out."""

import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, load_from_disk
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging

from smolpost.chat.render import load_template
from smolpost.errors import UserError
from smolpost.model.attention_kernels import kernel_name
from smolpost.model.loading import load_model
from smolpost.model.stored import CONFIG, read_config
from smolpost.training import activations
from smolpost.training.adapters import add_adapters, merged
from smolpost.training.arguments import total_steps
from smolpost.training.batch_size import check_global_batch
from smolpost.training.checkpoints import Snapshots, last_whole, num_bytes
from smolpost.training.environment import Environment, backend_name, check_ranks
from smolpost.training.flops import row_flops
from smolpost.training.matmul_rate import matmul_tflops
from smolpost.training.round_trip import check_written, loss_on, probe
from smolpost.training.settings import Training
from smolpost.training.start import check_start
from smolpost.training.stop_tokens import StopTokens, change, stop_tokens
from smolpost.training.teacher import check_teacher, load_teacher
from smolpost.training.trainer import Run


class Method(Protocol):
    """How a stage trains on its layout of rows: a module like `sft`, `preference` or those of `with_trl`."""

    def check(self, name: str, stage: Training, rows: Dataset, environment: Environment) -> None:
        """Refuse what the engine cannot train as asked.

        Raises:
            UserError: With the remedy; `name` is the stage's.
        """

    def reference(
        self,
        stage: Training,
        rows: Dataset,
        start: Path,
        load_start: Callable[[], PreTrainedModel],
        references: Path,
        environment: Environment,
    ) -> tuple[Any, dict]:
        """What the start checkpoint has to give before the model is loaded, if anything, and its part of the report.

        Where the stage has a teacher, the teacher stands in the start checkpoint's place. Every rank calls; it talks to
        no other.
        """

    def arguments(
        self, stage: Training, seed: int, num_rows: int, out: Path, environment: Environment
    ) -> TrainingArguments:
        """The engine's settings, made before the model is loaded."""

    def trainer(
        self,
        stage: Training,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        reference: Any,
        arguments: TrainingArguments,
        seed: int,
        environment: Environment,
    ) -> Run:
        """The training loop; all ranks are done with `reference`."""


def train(
    name: str,
    stage: Training,
    method: Method,
    *,
    seed: int,
    start: Path,
    prepared: Path,
    out: Path,
    references: Path,
    attn_implementation: str,
    environment: Environment,
    teacher: Path | None = None,
) -> dict:
    """Train to the end, from the last complete checkpoint in `out` if there is one.

    Args:
        name: The stage, for messages.
        method: How it trains on its rows.
        start: Folder of the checkpoint to start from; APO's reference, too.
        prepared: Folder of the prepared rows.
        out: Folder for checkpoints, logs and, at the end, the final model and tokenizer.
        references: Folder of the reference caches, which all stages share.
        environment: From `environment.detect`, called before anything of accelerate.
        teacher: Folder of the checkpoint beside which the stage trains, where that is not its start.
    Returns:
        On rank 0: steps, epochs, loss first and last, seconds, the whole log; {} on other ranks.
    Raises:
        UserError: The batch is too small for the ranks, the engine cannot train as asked, the ranks do not know of one
            another, the start checkpoint cannot be trained, the reference is not finite, nothing could stop the trained
            model, the disk has no room for the checkpoints, or the written model is not the trained one.
    """
    began = time.monotonic()
    logging.disable_progress_bar()  # weights loaded and written, for seconds each: the stage shows a bar of its own
    check_global_batch(name, stage.global_batch_size, environment.world_size)
    rows = load_from_disk(str(prepared))
    method.check(name, stage, rows, environment)
    renamed = check_start(name, stage, start, attn_implementation)
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = load_template(stage.template)
    stops = stop_tokens(name, stage, rows, start, tokenizer)
    if environment.rank == 0 and (line := change(name, stops)):
        print(line, flush=True)
    load_start = functools.partial(load, start, stage, attn_implementation, renamed)
    # Before the arguments, which make ZeRO-3 shard the reference, and before the policy takes memory.
    beside, load_beside = start, load_start
    if teacher is not None:
        known = check_teacher(name, stage, teacher, start, attn_implementation)
        beside, load_beside = teacher, functools.partial(load_teacher, teacher, attn_implementation, known)
    reference, report = method.reference(stage, rows, beside, load_beside, references, environment)
    # Before the model: under ZeRO-3 the arguments make from_pretrained build sharded parameters (zero.Init).
    arguments = method.arguments(stage, seed, len(rows), out, environment)
    check_ranks(environment, arguments.world_size)
    model = trainable(name, stage, load_start, seed, environment)
    stops.give(model, tokenizer)  # a method that samples stops there, too
    check_space(name, stage, model, len(rows), out, environment)
    arguments.distributed_state.wait_for_everyone()  # for the other ranks' part of the reference
    trainer = metered_trainer(stage, method, model, tokenizer, rows, reference, arguments, seed, environment)
    if environment.rank == 0 and (idle := trainer.idle_share()):
        print(
            f"stages.{name}.global_batch_size={stage.global_batch_size} does not divide over {environment.world_size} "
            f"ranks: {idle:.0%} of the forward passes are empty",
            flush=True,
        )
    write = functools.partial(
        save, name, trainer, tokenizer, stops, load_start, dtype=torch.bfloat16 if environment.bf16 else torch.float32
    )
    if stage.snapshot_steps:
        trainer.add_callback(Snapshots(stage.snapshot_steps, write))
    resume = _resume_point(trainer, out, environment)
    trainer.train(resume_from_checkpoint=resume)
    tokens = probe(rows).to(environment.device)
    trained_loss = loss_on(trainer.model_wrapped, tokens)
    write(out)
    report |= check_written(name, out, tokens, trained_loss, trainer, environment, attn_implementation)
    if not trainer.is_world_process_zero():
        return {}
    seconds = round(time.monotonic() - began, 1)
    return report | {"stop_tokens": stops.report, "seconds": seconds} | _report(trainer, resume, environment)


def trainable(
    name: str, stage: Training, load_start: Callable[[], PreTrainedModel], seed: int, environment: Environment
) -> PreTrainedModel:
    """The start checkpoint with what the stage changes in it: adapters, and what its layers keep for backward."""
    model = load_start()
    if stage.lora.r:
        model = add_adapters(model, stage.lora, seed)
    activations.apply(name, model, activations.policy_of(name, stage, model, environment))
    return model


def metered_trainer(
    stage: Training,
    method: Method,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    reference: Any,
    arguments: TrainingArguments,
    seed: int,
    environment: Environment,
) -> Run:
    """`Method.trainer`, whose log lines on rank 0 say how much of the device's speed the rows' work uses."""
    needed = row_flops(model, rows) if environment.rank == 0 else None
    rate = None if needed is None else matmul_tflops(environment)  # before the device has the model
    trainer = method.trainer(stage, model, tokenizer, rows, reference, arguments, seed, environment)
    trainer.meter.row_flops, trainer.meter.matmul_tflops = needed, rate
    return trainer


def _report(trainer: Run, resume: str | None, environment: Environment) -> dict:
    """What the trainer's state says of the whole training."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 4),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "resumed_from": Path(resume).name if resume else None,
        "num_processes": environment.world_size,
        "device": "cpu" if environment.use_cpu else torch.cuda.get_device_name(),
        "precision": "bf16" if environment.bf16 else "fp32",
        "attention_kernel": kernel_name(),  # of packed attention; None where the model has another
        "speed": trainer.meter.summary()
        | {"idle_share": trainer.idle_share()}
        | ({"matmul_tflops": rate} if (rate := trainer.meter.matmul_tflops) else {}),
        "log": trainer.state.log_history,
    }


def load(
    start: Path, stage: Training, attn_implementation: str, renamed: dict[str, str] | None = None
) -> PreTrainedModel:
    """The start checkpoint in fp32 with the stage's context settings; `renamed` as for `load_model`."""
    # fp32 master weights at every compute precision: bf16 weights would not change at APO's learning rate.
    return load_model(
        start,
        config=start_config(start, stage),
        renamed=renamed,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
    )


def start_config(start: Path, stage: Training) -> PreTrainedConfig:
    """The start checkpoint's config with the stage's context settings."""
    config = read_config(start / CONFIG)
    if stage.rope_theta is not None:
        config.rope_parameters = {**config.rope_parameters, "rope_theta": stage.rope_theta}
    if stage.max_position_embeddings is not None:
        config.max_position_embeddings = stage.max_position_embeddings
    return config


def check_space(
    name: str, stage: Training, model: PreTrainedModel, num_rows: int, out: Path, environment: Environment
) -> None:
    """Refuse a training whose checkpoints, snapshots and final weights do not fit on the disk.

    Beside the checkpoints that stay lies one more, while the oldest makes room or because a signal asks for it, and
    later the final weights. What an earlier try has left in `out` is part of what is needed.

    Raises:
        UserError: With both sizes and the remedies.
    """
    sizes = [getattr(p, "ds_numel", p.numel()) for p in model.parameters()]  # ds_numel: sharded by ZeRO-3
    trained = sum(size for size, p in zip(sizes, model.parameters(), strict=True) if p.requires_grad)
    steps = total_steps(stage, num_rows)
    # The last step leaves neither.
    kept = min((steps - 1) // stage.save_steps, stage.save_total_limit)
    snapshots = (steps - 1) // stage.snapshot_steps if stage.snapshot_steps else 0
    weights, checkpoint = (2 if environment.bf16 else 4) * sum(sizes), num_bytes(trained)
    needed = checkpoint * kept + weights * snapshots + max(checkpoint, weights)
    lies_there = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    free = shutil.disk_usage(out).free
    if free + lies_there < needed:
        raise UserError(
            f"{out} needs {(needed - lies_there) / 1e9:.3g} GB{' more' if lies_there else ''} for checkpoints and its "
            f"disk has {free / 1e9:.3g} GB free; free some, lower "
            f"stages.{name}.save_total_limit={stage.save_total_limit}"
            + (f", raise stages.{name}.snapshot_steps={stage.snapshot_steps}" if snapshots else "")
            + ", or set run_dir=FOLDER elsewhere"
        )


def save(
    name: str,
    trainer: Trainer,
    tokenizer,
    stops: StopTokens,
    load_start: Callable[[], PreTrainedModel],
    out: Path,
    dtype: torch.dtype,
) -> None:
    """The model as it is now, in `dtype`, alike under every backend, with its tokenizer and chat template."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(model, PeftModel):
            unset_hf_deepspeed_config()  # only this rank loads: nothing to shard
            model = merged(load_start(), model, state, f"stages.{name}.lora")
            state = model.state_dict()
        # Gathering may copy a tied weight; it is stored once.
        state = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
        stops.give(model, tokenizer)
        model.config.dtype, training_dtype = dtype, model.config.dtype
        model.config.use_cache, training_cache = True, model.config.use_cache  # training turns it off
        model.save_pretrained(out, state_dict={name: tensor.to(dtype) for name, tensor in state.items()})
        model.config.dtype, model.config.use_cache = training_dtype, training_cache
        tokenizer.save_pretrained(out)
    trainer.accelerator.wait_for_everyone()


def _resume_point(trainer: Run, out: Path, environment: Environment) -> str | None:
    """The folder that training goes on from; all ranks call."""
    found: list = [None]
    if trainer.is_world_process_zero() and (last := last_whole(out)):
        checkpoint, mark = last
        found = [str(checkpoint)]
        now = backend_name(trainer.accelerator), environment.world_size
        moved = f", saved under {_ranks(mark.backend, mark.num_ranks)}, going on under {_ranks(*now)}"
        print(f"resuming from {checkpoint}{moved if now != (mark.backend, mark.num_ranks) else ''}", flush=True)
        if mark.num_ranks != environment.world_size and (trainer.SAMPLES or _has_dropout(trainer.model)):
            what = "sampling" if trainer.SAMPLES else "dropout"
            print(f"{what} draws other numbers from here than it would have on the earlier ranks", flush=True)
    broadcast_object_list(found)
    return found[0]


def _ranks(backend: str, number: int) -> str:
    return f"{backend} on {number} rank{'s' if number > 1 else ''}"


def _has_dropout(model: torch.nn.Module) -> bool:
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    return any(dropouts) or any(value for key, value in vars(model.config).items() if key.endswith("dropout"))
