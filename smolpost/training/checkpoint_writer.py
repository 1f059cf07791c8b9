"""Writes resumable checkpoints beside the training: each rank copies its share, and a thread brings it to the disk.

Training goes on once the copies are made. The threads use no collectives: each rank's thread lists its files in a file
of its own, and rank 0's thread waits for all lists before it writes the mark.
"""

import functools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
import xxhash
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from smolpost.errors import UserError
from smolpost.files import write_json
from smolpost.merging.shards import Pool, plan_shards
from smolpost.training.checkpoints import WHOLE, hash_of, num_bytes, random_file, whole
from smolpost.training.host_memory import HostCopies, free_memory
from smolpost.training.state import state_of, trained_parameters

SHARD_BYTES = 5 * 10**8  # of one file; a larger tensor gets its own file
WRITERS = 3  # files written at the same time; without copies they are held in memory, while one more is gathered
SPARE = 1.25  # copies are made where so many times their size is free
PATIENCE = 1800  # seconds for which rank 0 waits for the other ranks' lists


class Writer(TrainerCallback):
    """Saves a trainer's checkpoints, one at a time; as a context, its end waits for the last one.

    What goes wrong in the thread is raised at the end of the next step, or by the next call.

    Attributes:
        copies: Training goes on while a copy is written. None before the first checkpoint, which decides it by the free
            memory; if False, training waits.
    """

    def __init__(self):
        self.copies: bool | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, trainer: Trainer, backend: str) -> None:
        """Save the trainer's step in its output folder and delete the oldest checkpoints; all ranks call.

        Raises:
            UserError: The backend's state cannot be saved.
            OSError: The disk is full, among others; the checkpoint has no mark then.
        """
        self.wait()
        arguments = trainer.args
        folder = Path(arguments.output_dir) / f"checkpoint-{trainer.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        small = [random_file(arguments.process_index)]
        safetensors.torch.save_file(_random_state(arguments.device), folder / small[0])
        if trainer.is_world_process_zero():
            small.append(TRAINER_STATE_NAME)
            trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for _, p in trained_parameters(trainer))
        if self.copies is None:
            self.copies = _has_room(trainer, num_bytes(num_parameters))
        write = functools.partial(
            _write, folder, small, rank=arguments.process_index, num_ranks=arguments.world_size, backend=backend,
            limit=arguments.save_total_limit,
        )  # fmt: skip
        if not self.copies:
            write(_shares(trainer, _on_cpu))
            return
        shares = list(_shares(trainer, HostCopies(num_bytes(num_parameters) // 4)))
        if arguments.device.type != "cpu":
            torch.accelerator.synchronize()
        self._thread = threading.Thread(target=self._run, args=(write, shares), name=str(folder), daemon=True)
        self._thread.start()

    def _run(self, write: Callable, shares: list) -> None:
        try:
            write(shares)
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; on rank 0, with all ranks' shares."""
        if self._thread:
            self._thread.join(1)
            if self._thread.is_alive():
                tqdm.write(f"waiting until {self._thread.name} is written")
                self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        if self._error:
            error, self._error = self._error, None
            raise error

    def on_step_end(self, args, state, control, **kwargs):
        self._raise()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None:
            self.wait()
        elif isinstance(error, Exception):  # a second signal does not wait
            with suppress(Exception):
                self.wait()


def _has_room(trainer: Trainer, size: int) -> bool:
    """Whether this machine's ranks can copy a checkpoint of so many bytes; says so if they cannot."""
    num_ranks = trainer.args.world_size
    needed = size * int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)) / num_ranks
    trainer.accelerator.wait_for_everyone()  # the copies of a rank that is ahead would count as used
    free = free_memory()
    if free >= SPARE * needed:
        return True
    if trainer.is_world_process_zero():
        tqdm.write(
            f"training waits for each checkpoint: writing beside it takes a copy of {needed / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB of memory are free"
        )
    return False


# ---------------------------------------------------------------- what is written


def _shares(trainer: Trainer, copy: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors of one file after another that this rank writes: "PART/PARAMETER", as `copy` brings them to the CPU.

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
        share |= {f"{part}/{name}": copy(tensor) for part, tensor in parts.items()}
        size += new
    if share:
        yield share


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32; the tensor itself where it is that already."""
    return tensor.float().cpu().contiguous()


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of torch's generators, which dropout and sampled replies draw from; nothing else in a step draws numbers."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


# ---------------------------------------------------------------- how


def _write(
    folder: Path,
    small: list[str],
    shares: Iterable[dict[str, torch.Tensor]],
    *,
    rank: int,
    num_ranks: int,
    backend: str,
    limit: int,
) -> None:
    """Write this rank's shares and its list; on rank 0, also the mark, and delete all but the newest checkpoints.

    Args:
        small: Files of this rank that are there already.
        limit: Checkpoints that stay.
    """
    entries = {}
    with Pool(WRITERS) as pool:
        for number, tensors in enumerate(shares):
            busy = [entry for entry in entries.values() if not entry.done()]
            if len(busy) == WRITERS:
                wait(busy, return_when=FIRST_COMPLETED)
            name = f"state-{rank:05d}-{number:05d}.safetensors"
            entries[name] = pool.submit(_write_tensors, folder / name, tensors)
    listed = {name: entry.result() for name, entry in entries.items()}
    listed |= {name: [(folder / name).stat().st_size, hash_of(folder / name)] for name in small}
    write_json(folder / _list_file(rank), listed)
    if rank == 0:
        write_json(folder / WHOLE, {"backend": backend, "num_ranks": num_ranks, "files": _all_lists(folder, num_ranks)})
        for old in whole(folder.parent)[:-limit]:
            shutil.rmtree(old)


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


def _list_file(rank: int) -> str:
    return f"share-{rank:05d}.json"


def _all_lists(folder: Path, num_ranks: int) -> dict[str, list]:
    """All ranks' entries of the mark, once all are there; the lists are removed.

    Raises:
        UserError: A rank's list does not come.
    """
    lists = [folder / _list_file(rank) for rank in range(num_ranks)]
    deadline = time.monotonic() + PATIENCE
    while missing := [file for file in lists if not file.exists()]:
        if time.monotonic() > deadline:
            raise UserError(
                f"{missing[0]} is not there after {PATIENCE} s: its rank has not written its part of the checkpoint; "
                "set run_dir to a folder that all machines of the training share"
            )
        time.sleep(0.05)
    found = [json.loads(file.read_text()) for file in lists]
    for file in lists:
        file.unlink()
    return {name: entry for entries in found for name, entry in entries.items()}
