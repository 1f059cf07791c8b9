"""What all of TRL's trainers need to run as a stage."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from smolpost.errors import UserError
from smolpost.training.arguments import shared_settings, total_steps
from smolpost.training.batches import GlobalBatches, by_count
from smolpost.training.environment import Environment
from smolpost.training.settings import Training, or_our_engine
from smolpost.training.trainer import Run


class FromTRL(Run):
    """A mixin before one of TRL's trainers: a stage's order of rows, checkpoints, signals and log."""

    def _get_train_sampler(self, train_dataset=None) -> Sampler[int]:
        return InOrder(self.batches)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            asked = torch.tensor(float(self.stop.asked.signum is not None), device=self.args.device)
            self.stop.agreed = bool(self.accelerator.reduce(asked, "sum"))
        return loss

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._total_train_tokens = self.state.num_input_tokens_seen  # TRL would count from 0 after a resume
        return prepared

    def _save_checkpoint(self, model, trial) -> None:
        self._count_tokens()
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._count_tokens()
        super().log(logs, start_time)

    def _count_tokens(self) -> None:
        self.state.num_input_tokens_seen = int(self._total_train_tokens)

    def idle_share(self) -> float:
        return 0.0  # `check` has refused what does not come out even

    def _send_telemetry(self) -> None:
        """TRL would report every training to its makers."""


class InOrder(Sampler[int]):
    """All rows of an epoch, in the order in which the optimizer steps take them."""

    def __init__(self, batches: GlobalBatches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self.batches.order().tolist())


def arguments_of(
    kind: type[TrainingArguments],
    stage: Training,
    micro_batch_size: int,
    seed: int,
    num_rows: int,
    out: Path,
    environment: Environment,
    *,
    replies: int = 1,
    **settings: Any,
) -> TrainingArguments:
    """TRL's configuration of a stage.

    Args:
        kind: TRL's class.
        micro_batch_size: Rows per rank and forward pass, or replies where several are sampled to a row.
        replies: Sampled to each row.
        settings: Of the class alone.
    """
    return kind(
        **shared_settings(stage, seed, num_rows, out, environment),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=stage.global_batch_size * replies // (micro_batch_size * environment.world_size),
        **settings,
    )


def batches_of(lengths: np.ndarray, stage: Training, seed: int, environment: Environment) -> GlobalBatches:
    """The stage's optimizer steps. Only their order counts: TRL makes the forward passes itself.

    Args:
        lengths: [N] tokens of each prepared row.
    """
    return GlobalBatches(
        lengths,
        stage.global_batch_size,
        functools.partial(by_count, micro_batch_size=1),
        seed=seed,
        rank=environment.rank,
        num_ranks=environment.world_size,
    )


def built(
    kind: type[FromTRL],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: GlobalBatches,
    **settings: Any,
) -> FromTRL:
    """The trainer. TRL gives tokenizer and model a padding token; the stage's own are left as they were.

    Args:
        settings: The trainer's own.
    """
    configs = (model.config.get_text_config(), model.generation_config)
    before = [config.pad_token_id for config in configs]
    trainer = kind(batches=batches, model=model, processing_class=copy.deepcopy(tokenizer), **settings)
    trainer.processing_class = tokenizer  # whose tokens transformers gives to the model when training begins
    for config, pad_token_id in zip(configs, before, strict=True):
        config.pad_token_id = pad_token_id
    return trainer


def check_even(
    name: str,
    stage: Training,
    micro_batch_size: int,
    key: str,
    num_rows: int,
    environment: Environment,
    *,
    counts_tokens: bool = False,
) -> None:
    """Refuse rows that do not come out even: accelerate would repeat some, and TRL weigh others more.

    Args:
        key: Of micro_batch_size, below the stage.
        counts_tokens: The loss is divided by the tokens of the global batch, so on one rank the last forward pass of an
            epoch may be smaller than the others.
    Raises:
        UserError: With the remedy.
    """
    where, ranks = f"stages.{name}", environment.world_size
    at_once = micro_batch_size * ranks
    passes = f"{where}.{key}={micro_batch_size}" + (f" on {ranks} ranks" if ranks > 1 else "")
    if stage.global_batch_size % at_once:
        raise UserError(
            f"{where}.global_batch_size={stage.global_batch_size} is not a multiple of {at_once}, the rows that "
            f"{passes} take at once, and TRL has no smaller forward pass; change one of them"
            f"{or_our_engine(stage, where)}"
        )
    steps, last = divmod(num_rows, stage.global_batch_size)
    if last % at_once and total_steps(stage, num_rows) > steps and not (counts_tokens and ranks == 1):
        shorter = f"stop before with {where}.max_steps={steps}, " if steps else ""
        raise UserError(
            f"{where}: {num_rows} rows leave {last} for the last step of an epoch, not a multiple of {at_once}, the "
            f"rows that {passes} take at once; TRL's trainers would repeat rows or weigh them unevenly; {shorter}"
            f"take other rows{or_our_engine(stage, where)}"
        )
