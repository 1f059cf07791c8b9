"""Resumable checkpoints: `checkpoint-STEP` in a stage's folder, for any backend and number of ranks.

Every rank writes a share of the parameters, whole and in fp32, with AdamW's moments, as safetensors; rank 0 adds the
trainer's state as JSON. There is no pickle, so nothing in a checkpoint can run. The mark is written last and names
every file with its size and hash: a checkpoint without it was cut short, one that differs from it is damaged.
"""

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import xxhash
from accelerate.utils import gather_object
from safetensors import safe_open
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from smolpost.errors import UserError
from smolpost.files import put, write_json
from smolpost.merging.shards import Pool, plan_shards
from smolpost.merging.trajectory import SNAPSHOTS
from smolpost.training.state import MOMENTS, PARTS, state_of, trained_parameters

WHOLE = "whole"  # the mark
SHARD_BYTES = 5 * 10**8  # of one file; a larger tensor gets its own file
WRITERS = 3  # files written (and held in CPU memory) at the same time, while one more is gathered


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


# ---------------------------------------------------------------- write


def write(trainer: Trainer, backend: str) -> None:
    """Save a checkpoint of the trainer's step into its output folder and delete the oldest ones; all ranks call.

    Raises:
        UserError: The backend's state cannot be saved.
        OSError: The disk is full, among others; the checkpoint has no mark then.
    """
    arguments = trainer.args
    folder = Path(arguments.output_dir) / f"checkpoint-{trainer.state.global_step}"
    folder.mkdir(parents=True, exist_ok=True)
    written = gather_object([_write_share(trainer, folder)])  # also a barrier
    if not trainer.is_world_process_zero():
        return
    trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
    listed = {name: entry for files in written for name, entry in files.items()}
    listed[TRAINER_STATE_NAME] = _entry(folder / TRAINER_STATE_NAME)
    mark = {"backend": backend, "num_ranks": arguments.world_size, "files": listed}
    write_json(folder / WHOLE, mark)
    for old in whole(folder.parent)[: -arguments.save_total_limit]:
        shutil.rmtree(old)


def _write_share(trainer: Trainer, folder: Path) -> dict[str, list]:
    """What this rank adds to a checkpoint; the files' entries in the mark."""
    rank, entries = trainer.args.process_index, {}
    with Pool(WRITERS) as pool:
        for number, tensors in enumerate(_shares(trainer)):
            busy = [entry for entry in entries.values() if not entry.done()]
            if len(busy) == WRITERS:
                wait(busy, return_when=FIRST_COMPLETED)
            name = f"state-{rank:05d}-{number:05d}.safetensors"
            entries[name] = pool.submit(_write_tensors, folder / name, tensors)
    random = _random_file(rank)
    safetensors.torch.save_file(_random_state(trainer.args.device), folder / random)
    return {name: entry.result() for name, entry in entries.items()} | {random: _entry(folder / random)}


def _shares(trainer: Trainer) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors of one file after another that this rank writes: "PART/PARAMETER", on the CPU.

    Every rank reads every parameter, as sharded ones are gathered by all, and keeps those with which it is the one
    that has least.
    """
    state = state_of(trainer)
    rank, taken = trainer.args.process_index, [0] * trainer.args.world_size
    share: dict[str, torch.Tensor] = {}
    size = 0
    for name, parameter in trained_parameters(trainer):
        parts = state.read(parameter)
        new = sum(part.nbytes for part in parts.values())
        owner = taken.index(min(taken))
        taken[owner] += new
        if owner != rank:
            continue
        if share and size + new > SHARD_BYTES:
            yield share
            share, size = {}, 0
        share |= {f"{part}/{name}": tensor.float().cpu().contiguous() for part, tensor in parts.items()}
        size += new
    if share:
        yield share


def _write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> list:
    """Write fp32 tensors without a copy of them; the file's entry in the mark, of what it should hold.

    Nothing waits for the disk: what a power cut keeps from it, the hash shows.
    """
    [plan] = plan_shards({name: tensor.shape for name, tensor in tensors.items()}, torch.float32, limit=sys.maxsize)
    state = xxhash.xxh3_64()
    with open(file, "wb") as out:
        for block in (plan.header, *(tensors[name].view(-1).numpy() for name in plan.tensors)):
            state.update(block)
            out.write(block)
    return [plan.size, state.hexdigest()]


def _entry(file: Path) -> list:
    return [file.stat().st_size, _hash_of(file)]


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.safetensors"


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of torch's generators, which dropout and sampled replies draw from; nothing else in a step draws numbers."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


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


def restore_random_state(folder: Path, rank: int, device: torch.device) -> None:
    """Go on with the numbers that would have been drawn; a rank that was not there keeps its own."""
    file = folder / _random_file(rank)
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
            if _hash_of(file) != expected:
                return None, f"the content of {name} is not what was written"
    except (ValueError, TypeError, AttributeError):
        return None, f"{WHOLE} is not a list of files with their hashes"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None, f"{error.filename or checkpoint} cannot be read: {error.strerror}"
    return mark, None


def _hash_of(file: Path) -> str:
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
