"""How a stage's training runs, and our engine: transformers' Trainer with a step that is one planned global batch."""

import abc
import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from accelerate.utils import AutocastKwargs, DistributedType
from peft import PeftModel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from smolpost import signals, stage_log
from smolpost.objectives.transfer import to_device
from smolpost.progress import Progress, seconds_later
from smolpost.signals import Stopped
from smolpost.training import checkpoints
from smolpost.training.adapters import frozen_in_bf16
from smolpost.training.batches import GlobalBatches, MicroBatch
from smolpost.training.checkpoint_writer import Writer
from smolpost.training.environment import backend_name
from smolpost.training.log_lines import Table
from smolpost.training.optimizer import decayed_parameters
from smolpost.training.scoring import score_tokens
from smolpost.training.speed import Meter
from smolpost.training.state import state_of
from smolpost.training.stop import EndOnce, NothingLeft, StopAtStep


class Run:
    """How a stage's training runs, whatever computes its loss: a mixin before a Trainer of transformers or TRL.

    It shows the steps, stops after a signal with a checkpoint, and saves and restores checkpoints that do not depend on
    the backend.

    Args:
        batches: This rank's rows, in order of optimizer steps.
        settings: The Trainer's own.
    Attributes:
        SAMPLES: A step draws replies of the model.
    """

    SAMPLES: ClassVar[bool] = False

    def __init__(self, *, batches: GlobalBatches, **settings: Any):
        self.steps, self.writer = Steps(), Writer()
        super().__init__(
            callbacks=[NewOrder(batches), Restored(self), EndOnce(), stop := StopAtStep(), self.steps, self.writer],
            **settings,
        )
        self.remove_callback(PrinterCallback)  # `Steps` prints the log, above its bar
        self.stop = stop
        self.batches = batches
        self.meter = Meter(batches, self.args.world_size, self.args.device)
        self.restored: str | None = None  # the checkpoint whose state is in model, optimizer and scheduler
        self.saved_step = 0  # of the last checkpoint

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Train to the end; after a signal, finish the step and save a checkpoint.

        Raises:
            Stopped: By the signal.
        """
        with contextlib.closing(self.stop.asked), self.steps.shown, self.writer:
            with contextlib.suppress(NothingLeft):
                super().train(resume_from_checkpoint=resume_from_checkpoint)
            asked = torch.tensor(float(self.stop.asked.signum is not None), device=self.args.device)
            if not self.accelerator.reduce(asked, "sum"):
                self.writer.wait()
                return
            if self.saved_step < self.state.global_step:  # the signal came too late for the last step to save
                self._save_checkpoint(self.model_wrapped, None)
            self.writer.wait()
            # The launcher ends all ranks when the first one exits, so all wait until the checkpoint is marked.
            self.accelerator.wait_for_everyone()
            raise Stopped(self.stop.asked.signum or signal.SIGTERM, f" at step {self.state.global_step}")

    def idle_share(self) -> float:
        """Share of the forward passes that only keep ranks in step, in [0, 1)."""
        return self.batches.idle_share()

    # Checkpoints are ours, the same under every backend; transformers' are each backend's own.

    def _save_checkpoint(self, model, trial) -> None:
        self.store_flos()
        self.writer.save(self, backend_name(self.accelerator))
        self.saved_step = self.state.global_step

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        state_of(self)  # refuses, before training, a state that could not be saved
        if resume_from_checkpoint is not None:
            checkpoints.restore(self, Path(resume_from_checkpoint))
            self.restored, self.saved_step = resume_from_checkpoint, self.state.global_step
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """The weights come with the rest, once the model is prepared."""

    def _load_rng_state(self, checkpoint) -> None:
        checkpoints.restore_random_state(Path(checkpoint), self.args.process_index, self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.meter.read(self.state.global_step, self.state.num_input_tokens_seen)
        if "train_runtime" in logs:
            logs |= self._speed(logs["train_runtime"])
        super().log(logs, start_time)

    def _speed(self, seconds: float) -> dict[str, float]:
        """Speed over the steps since the last resume; transformers would count a step as one sample.

        Tokens are those read, padding included, as in `num_tokens`.
        """
        steps = range(self.steps.first, self.state.global_step)
        counts = {
            "samples": self.batches.num_rows(steps),
            "steps": len(steps),
            "tokens": self.state.num_input_tokens_seen - self.steps.first_tokens,
        }
        return {f"train_{what}_per_second": round(count / seconds, 3) for what, count in counts.items()}

    def get_decay_parameter_names(self, model) -> list[str]:
        return decayed_parameters(model)


class StageTrainer(Run, Trainer, abc.ABC):
    """Our engine: planned batches, losses normalised over the global batch, exact metrics.

    A subclass says what it counts in a forward pass (`count`) and how a pass becomes a loss (`pass_loss`). On one GPU
    a step asks it for nothing: what Python must know of a batch is read on the CPU, before or beside the copy.

    Args:
        model: A causal LM, or one with peft's adapters; its forward learns the keyword `scored`.
        rows: Prepared rows, by index.
        collate: Rows -> tensors of a forward pass.
        batches: This rank's forward passes.
    Attributes:
        ON_CPU: What of a batch stays there.
    """

    ON_CPU: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        rows: torch.utils.data.Dataset,
        collate: Callable[[list[dict]], dict],
        batches: GlobalBatches,
    ):
        score_tokens(model.get_base_model() if isinstance(model, PeftModel) else model)
        super().__init__(batches=batches, model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        # A forward pass reads each weight once, so autocast's cache would only keep a bf16 copy of all of them.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        # FSDP2 and ZeRO shard weights of one dtype, so they keep fp32.
        if isinstance(model, PeftModel) and arguments.bf16 and backend_name(self.accelerator) == "single":
            frozen_in_bf16(model)
        self.collate = collate
        self.sums: dict[str, torch.Tensor] = {}  # metric -> [weighted sum, weight] of this rank since the last log

    @abc.abstractmethod
    def count(self, batch: dict) -> list[float]:
        """What the loss is divided by, in one forward pass; the trainer sums it over the global batch."""

    @abc.abstractmethod
    def pass_loss(self, model, batch: dict, counts: bool, totals: torch.Tensor) -> torch.Tensor:
        """This pass's share of the global batch's loss.

        Args:
            batch: From `collate`, on the device but for what is ON_CPU.
            counts: False where the pass must add nothing, in gradients and metrics.
            totals: `count` summed over all passes of all ranks, float64 on the CPU; further numbers follow.
        """

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            PassRows(self.train_dataset),
            batch_sampler=self.batches,
            collate_fn=lambda passes: [(self.collate(rows), counts) for rows, counts in passes],
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """All forward and backward passes of one optimizer step on this rank."""
        numbers = [
            [number * counts for number in (*self.count(batch), batch["input_ids"].numel())] for batch, counts in inputs
        ]
        totals = torch.tensor(numbers, dtype=torch.float64).sum(0)
        totals = torch.nn.functional.pad(totals, (0, 1), value=self.stop.asked.signum is not None)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.to(self.args.device), "sum").cpu()
        self.state.num_input_tokens_seen += int(totals[-2])
        self.stop.agreed = bool(totals[-1])
        loss = torch.zeros((), device=self.args.device)
        for i, one_pass in enumerate(inputs):
            is_last = i == len(inputs) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            waits = is_last or self.accelerator.distributed_type == DistributedType.DEEPSPEED
            with contextlib.nullcontext() if waits else self.accelerator.no_sync(model):
                loss += super().training_step(model, one_pass, totals)
        return loss

    def _prepare_input(self, data):
        """Move a batch, or a part of it, to the device."""
        if isinstance(data, dict):
            return {key: x if key in self.ON_CPU else self._prepare_input(x) for key, x in data.items()}
        if isinstance(data, torch.Tensor):
            return to_device(data, self.args.device)
        return super()._prepare_input(data)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        batch, counts = inputs
        if self.accelerator.num_processes > 1:
            self.observe("idle_share", torch.full((), float(not counts), device=self.args.device), 1)
        # Gradients are averaged over the ranks, but the loss is already divided by the total of all ranks.
        return self.pass_loss(model, batch, counts, num_items_in_batch) * self.accelerator.num_processes

    def observe(self, metric: str, total: torch.Tensor, weight: int) -> None:
        """Add this pass's weighted sum to a metric; the log shows the mean over passes, steps and ranks."""
        found = torch.stack((total.detach().float(), torch.full_like(total, weight, dtype=torch.float32)))
        self.sums[metric] = self.sums.get(metric, 0) + found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.sums:
            sums = self.accelerator.reduce(torch.stack(list(self.sums.values())), "sum")
            ratios = (sums[:, 0] / sums[:, 1]).tolist()  # nan where nothing was observed
            logs |= dict(zip(self.sums, ratios, strict=True)) | {"num_tokens": self.state.num_input_tokens_seen}
            self.sums = {}
        super().log(logs, start_time)


class NewOrder(TrainerCallback):
    """Tells the batches which epoch begins, also after a resume in the middle of one."""

    def __init__(self, batches: GlobalBatches):
        self.batches = batches

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.batches.set_epoch(int(state.epoch or 0))


class Restored(TrainerCallback):
    """Stops a training that transformers would begin at a later step with the first step's weights.

    The methods that restore them are transformers' own names, which another version may not call.
    """

    def __init__(self, trainer: Run):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step and not self.trainer.restored:
            raise RuntimeError(
                f"transformers {transformers.__version__} does not call Run._prepare_for_training; install "
                "the version of constraints.txt"
            )


class Steps(TrainerCallback):
    """Shows the progress of the training, with the log in lines above it.

    Attributes:
        first: Optimizer steps that an earlier run has done.
        first_tokens: Tokens that it read.
        shown: Ends with the training, whatever ends it.
    """

    def __init__(self):
        self.shown = contextlib.ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.first_tokens = state.global_step, state.num_input_tokens_seen
        self._since: tuple[float, int] | None = None  # time and step at the end of this process's first step
        self._later = seconds_later()
        self._table = Table(state.max_steps, under_run=signals.UNDER_RUN in os.environ)
        what = f"train on {args.world_size} x {args.device.type}"
        progress = Progress(
            what, state.max_steps, "step", done=self.first, shown=state.is_world_process_zero, lines=False
        )
        self.progress = self.shown.enter_context(progress)

    def on_step_end(self, args, state, control, **kwargs):
        self._since = self._since or (time.monotonic(), state.global_step)
        self.progress.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            left = self._left(state)
            for line in self._table.lines(state.global_step, logs, left, self._later):
                tqdm.write(line)
            stage_log.note_step(
                step=state.global_step,
                steps=state.max_steps,
                loss=float(logs["loss"]),
                tokens_per_second=logs.get("tokens_per_second"),
                seconds_left=left,
            )

    def _left(self, state) -> float | None:
        """Seconds until the last step, at the pace since the first one, which also compiles."""
        began, first = self._since
        done = state.global_step - first
        return (time.monotonic() - began) * (state.max_steps - state.global_step) / done if done else None


class PassRows(torch.utils.data.Dataset):
    """The rows of a forward pass at a time."""

    def __init__(self, rows: torch.utils.data.Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, micro: MicroBatch) -> tuple[list[dict], bool]:
        return [self.rows[row] for row in micro.rows], micro.counts
