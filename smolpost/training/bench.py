"""A few steps of a training stage on random weights, for its speed and memory alone."""

import copy
import dataclasses
import functools
import time
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from smolpost.errors import UserError
from smolpost.training.adapters import check_targets
from smolpost.training.batch_size import check_global_batch
from smolpost.training.environment import Environment, check_ranks
from smolpost.training.settings import Training
from smolpost.training.train import Method, metered_trainer, start_config, trainable

WARM_UP = 1  # steps; allocations, compilation and the choice of kernels


def bench(
    name: str,
    stage: Training,
    method: Method,
    *,
    start: Path,
    rows: Path,
    out: Path,
    steps: int,
    attn_implementation: str,
    environment: Environment,
) -> dict:
    """Train for a few steps by the stage's settings, without checkpoints.

    Args:
        name: The stage, for messages.
        method: How it trains on its rows.
        start: Folder with config.json and a tokenizer; the weights are random.
        rows: Folder of prepared rows.
        out: Folder for what the trainer writes; to be removed.
        steps: Measured, after WARM_UP more.
    Returns:
        On rank 0: seconds_per_step, device, precision, num_processes, what `Meter.summary` has, and seconds for each
        scored pair where a reference is scored before training. {} on other ranks.
    Raises:
        UserError: The engine cannot train as asked, or the device has too little memory.
    """
    check_global_batch(name, stage.global_batch_size, environment.world_size)
    stage = dataclasses.replace(
        stage, max_steps=WARM_UP + steps, logging_steps=WARM_UP + steps, snapshot_steps=None, report_to=[]
    )
    found = load_from_disk(str(rows))
    method.check(name, stage, found, environment)
    tokenizer = AutoTokenizer.from_pretrained(start)
    load_start = functools.partial(_random_model, start, stage, attn_implementation, environment)
    if stage.lora.r:
        check_targets(name, start_config(start, stage), stage.lora)
    try:
        began = time.perf_counter()
        reference, report = method.reference(stage, found, start, load_start, out / "references", environment)
        spent = time.perf_counter() - began
        arguments = method.arguments(stage, 0, len(found), out, environment)
        check_ranks(environment, arguments.world_size)
        arguments.set_save("no")
        model = trainable(name, stage, load_start, 0, environment)
        arguments.distributed_state.wait_for_everyone()  # for the other ranks' part of the reference
        trainer = metered_trainer(stage, method, model, tokenizer, found, reference, arguments, 0, environment)
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"stage={name} does not fit on {torch.cuda.get_device_name()} "
            f"({torch.cuda.mem_get_info()[1] / 1e9:.3g} GB): {str(error).splitlines()[0]} Use more ranks, or less in a "
            f"forward pass, or set stages.{name}.activation_checkpointing=full"
        ) from error
    if environment.rank:
        return {}
    pairs = report.get("reference_pairs_scored")
    return trainer.meter.summary() | {
        "seconds_per_step": trainer.meter.seconds / trainer.meter.steps,
        "tokens_per_step": trainer.meter.tokens / trainer.meter.steps,
        "matmul_tflops": trainer.meter.matmul_tflops,
        "idle_share": trainer.idle_share(),
        "num_processes": environment.world_size,
        "device": "CPU" if environment.use_cpu else torch.cuda.get_device_name(),
        "precision": "bf16" if environment.bf16 else "fp32",
        "reference_pairs_per_second": pairs / spent if pairs else None,
    }


def _random_model(start: Path, stage: Training, attn_implementation: str, environment: Environment) -> PreTrainedModel:
    """As `train.load`, but with random weights, made on the device: billions of them take minutes on a CPU."""
    torch.manual_seed(0)
    config = copy.deepcopy(start_config(start, stage))
    with environment.device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
