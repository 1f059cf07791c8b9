"""Resumable checkpoints: `checkpoint-STEP` in a stage's folder, for any backend and number of ranks.

Every rank writes a share of the parameters, whole and in fp32, with AdamW's moments, as safetensors; rank 0 adds the
trainer's state as JSON. There is no pickle, so nothing in a checkpoint can run. The mark is written last and names
every file with its size and hash: a checkpoint without it was cut short, one that differs from it is damaged.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import xxhash
from safetensors import safe_open
from transformers import Trainer, TrainerCallback

from smolpost.errors import UserError
from smolpost.files import put
from smolpost.merging.trajectory import SNAPSHOTS
from smolpost.training.state import MOMENTS, PARTS, state_of, trained_parameters

WHOLE = "whole"  # the mark


@dataclass(frozen=True)
class Mark:
    """The facts that a complete checkpoint records.

    Attributes:
        backend: ddp, fsdp2, zero3 and the like, under which it was saved.
        num_ranks: That saved it.
        files: Name -> [bytes, XXH3 in hex]. Damage is an accident, so no cryptographic hash is needed.
    """

    backend: str
    num_ranks: int
    files: dict[str, list]


class Snapshots(TrainerCallback):
    """Keeps snapshots of the weights at regular steps, for an average along the run.

    Args:
        every: Optimizer steps.
        save: Writes the model as it is now into a folder; all ranks call it.
    """

    def __init__(self, every: int, save: Callable[[Path], None]):
        self.every, self.save = every, save

    def on_step_end(self, args, state, control, **kwargs):
        if (
            state.global_step % self.every or state.global_step == state.max_steps
        ):  # the last weights are the stage's result
            return
        folder = Path(args.output_dir) / SNAPSHOTS / f"step-{state.global_step}"
        part = folder.with_name(f".{folder.name}.part")
        self.save(part)
        if state.is_world_process_zero:
            put(part, folder)  # replaces that of a run that stopped after this step and continued before it


# ---------------------------------------------------------------- read


def restore(trainer: Trainer, folder: Path) -> None:
    """Load a complete checkpoint into a trainer with prepared model, optimizer and scheduler; all ranks call.

    Raises:
        UserError: The checkpoint is of other parameters than the model's.
    """
    places = {}
    for file in sorted(folder.glob("state-*.safetensors")):
        with safe_open(file, "pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    state, steps = state_of(trainer), trainer.state.global_step
    left = set(places)
    for name, parameter in trained_parameters(trainer):
        keys = {part: f"{part}/{name}" for part in PARTS if f"{part}/{name}" in places}
        parts = {part: _tensor(places[key], key) for part, key in keys.items()}
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ds_shape: sharded by ZeRO-3
        if not parts or any(part.shape != shape for part in parts.values()):
            raise UserError(
                f"{folder} does not hold {name} of shape {list(shape)}, which the stage trains; it belongs to another "
                f"stage: remove {folder.parent} and run the stage again"
            )
        left -= set(keys.values())
        state.write(parameter, parts, steps)
    if left:
        raise UserError(
            f"{folder} holds {min(left)} ({len(left)} such), which the stage does not train; it belongs to another "
            f"stage: remove {folder.parent} and run the stage again"
        )
    _set_schedule(trainer.lr_scheduler, steps)


def _set_schedule(schedule: torch.optim.lr_scheduler.LambdaLR, steps: int) -> None:
    """Set the learning rates to their values after a number of steps.

    They follow from the step alone. A stored list of them would not fit: DeepSpeed has no group for no parameters.
    """
    rates = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    unchanged = [None] * len(rates)
    schedule.load_state_dict(
        {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates, "lr_lambdas": unchanged}
    )
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _tensor(file: Path, key: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key)


def random_file(rank: int) -> str:
    """Name of the file with a rank's random state."""
    return f"random-{rank:05d}.safetensors"


def restore_random_state(folder: Path, rank: int, device: torch.device) -> None:
    """Go on with the numbers that would have been drawn; a rank that was not there keeps its own."""
    file = folder / random_file(rank)
    if not file.exists():
        return
    states = safetensors.torch.load_file(file)
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)


# ---------------------------------------------------------------- find


def last_whole(folder: Path) -> tuple[Path, Mark] | None:
    """The newest complete checkpoint; incomplete and damaged ones are deleted, with a line for each.

    Reads every byte of the one it returns. One process calls it.
    """
    for checkpoint in set(_checkpoints(folder)) - set(whole(folder)):
        print(f"{checkpoint} was cut short while saving; removed", flush=True)
        shutil.rmtree(checkpoint)
    for checkpoint in reversed(whole(folder)):
        mark, damage = _examine(checkpoint)
        if not damage:
            return checkpoint, mark
        print(
            f"{checkpoint} is damaged ({damage}); it is removed, and training continues from the previous one",
            flush=True,
        )
        shutil.rmtree(checkpoint)
    return None


def _examine(checkpoint: Path) -> tuple[Mark | None, str | None]:
    """Its mark, and what is wrong with it."""
    try:
        mark = Mark(**json.loads((checkpoint / WHOLE).read_text()))
        for name, (size, expected) in mark.files.items():
            file = checkpoint / name
            found = file.stat().st_size if file.is_file() else None
            if found is None:
                return None, f"{name} is missing"
            if found != size:
                return None, f"{name} has {found:,} bytes, not {size:,}"
            if hash_of(file) != expected:
                return None, f"the content of {name} is not what was written"
    except (ValueError, TypeError, AttributeError):
        return None, f"{WHOLE} is not a list of files with their hashes"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None, f"{error.filename or checkpoint} cannot be read: {error.strerror}"
    return mark, None


def hash_of(file: Path) -> str:
    """XXH3 of its content, in hex."""
    state = xxhash.xxh3_64()
    with open(file, "rb") as opened:
        while block := opened.read(2**22):
            state.update(block)
    return state.hexdigest()


def whole(folder: Path) -> list[Path]:
    """Checkpoints that were saved to their end, oldest first."""
    return [c for c in _checkpoints(folder) if (c / WHOLE).exists()]


def remove_all(folder: Path) -> None:
    """Delete the resumable checkpoints of a finished stage: its final weights are in the folder itself."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)


def num_bytes(num_parameters: int) -> int:
    """Of a checkpoint with so many trained parameters."""
    return 4 * num_parameters * (1 + len(MOMENTS))


def _checkpoints(folder: Path) -> list[Path]:
    found = [
        (int(m.group(1)), p) for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [path for _, path in sorted(found)]
