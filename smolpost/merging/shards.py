"""Streamed safetensors: means of mapped checkpoints, written into shards whose layout is planned in advance.

The header is written first; then threads write chunks at their offsets. This needs memory for a few chunks per thread,
for models of any size. The bytes do not depend on the number of threads.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import local

import torch

from smolpost.files import write_json
from smolpost.merging.average import Mean, is_finite
from smolpost.merging.checkpoint import CHUNK, Checkpoint
from smolpost.model.stored import INDEX, WEIGHTS

SHARD_BYTES = 5 * 10**9
MAX_THREADS = 8  # more do not read faster from one disk
# Elements of one task: small enough to spread a large tensor over the threads.
TASK = 16 * CHUNK
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PART = ".part"  # ends the name of a file that is not complete


class NotFinite(Exception):
    """The mean of a tensor has NaN or infinity; the argument is its name."""


@dataclass(frozen=True)
class Shard:
    """One file to write.

    Attributes:
        file: Its name.
        header: Length field and JSON, the file's first bytes.
        tensors: Name -> (offset of its first byte in the file, elements).
        size: Bytes of the file.
    """

    file: str
    header: bytes
    tensors: dict[str, tuple[int, int]]
    size: int


def default_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MAX_THREADS)


def plan_shards(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, limit: int = SHARD_BYTES) -> list[Shard]:
    """Assign tensors to files by name, at most `limit` bytes of weights in each; a larger tensor gets its own file."""
    groups, filled = [[]], 0
    for name in sorted(shapes):
        size = math.prod(shapes[name]) * dtype.itemsize
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    stem, ending = WEIGHTS.split(".")
    files = [f"{stem}-{i:05d}-of-{len(groups):05d}.{ending}" for i in range(1, len(groups) + 1)]
    names = files if len(groups) > 1 else [WEIGHTS]
    return [_shard(file, {n: shapes[n] for n in group}, dtype) for file, group in zip(names, groups, strict=True)]


def _shard(file: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Shard:
    entries, starts, end = {}, {}, 0
    for name, shape in shapes.items():
        number = math.prod(shape)
        starts[name] = (end, number)
        offsets = [end, end + number * dtype.itemsize]
        entries[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors' bytes are aligned
    header = len(text).to_bytes(8, "little") + text
    tensors = {name: (len(header) + start, number) for name, (start, number) in starts.items()}
    return Shard(file, header, tensors, len(header) + end)


def index_of(shards: list[Shard]) -> dict:
    """Content of model.safetensors.index.json."""
    places = {name: shard.file for shard in shards for name in shard.tensors}
    total = sum(shard.size - len(shard.header) for shard in shards)
    return {"metadata": {"total_size": total}, "weight_map": places}


def write_mean(
    checkpoints: list[Checkpoint],
    folder: Path,
    dtype: torch.dtype,
    *,
    limit: int = SHARD_BYTES,
    threads: int | None = None,
    finished: Callable[[Path], object] = lambda file: None,
) -> list[Shard]:
    """Write the weighted mean of checkpoints with equal tensors into a folder.

    Args:
        limit: Bytes of weights per file.
        threads: At work at once, at most; all cores, eight at most, by default.
        finished: Called with each complete and renamed file, while the next one is written.
    Raises:
        NotFinite: An element of the mean is NaN or infinite in `dtype`.
        OSError: The disk is full, among others. Files whose names end in .part stay.
    """
    threads = threads or default_threads()
    shapes = {name: tensor.shape for name, tensor in checkpoints[0].tensors.items()}
    shards = plan_shards(shapes, dtype, limit)
    weights = [checkpoint.weight for checkpoint in checkpoints]
    own = local()

    def write(file: int, name: str, offset: int, first: int, last: int) -> None:
        if not hasattr(own, "mean"):
            own.mean = Mean(weights, dtype, CHUNK)
        inputs = [checkpoint.values(name) for checkpoint in checkpoints]
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            mean = own.mean([values[start:stop] for values in inputs])
            if not is_finite(mean):
                raise NotFinite(name)
            _write_all(file, mean.view(torch.uint8).numpy(), offset + start * dtype.itemsize)

    with one_torch_thread():
        for shard in shards:
            part = folder / (shard.file + PART)
            # The threads end before the file is closed.
            with _create(part, shard.size) as file, Pool(threads) as pool:
                _write_all(file, shard.header, 0)
                finish(
                    pool.submit(write, file, name, offset, first, min(first + TASK, number))
                    for name, (offset, number) in shard.tensors.items()
                    for first in range(0, number, TASK)
                )
            part.rename(folder / shard.file)
            finished(folder / shard.file)
    if len(shards) > 1:
        write_json(folder / INDEX, index_of(shards))
    return shards


def write_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    dtype: torch.dtype,
    *,
    limit: int = SHARD_BYTES,
    finished: Callable[[Path], object] = lambda file: None,
) -> list[Shard]:
    """Write tensors as they come, in any order, into shards of the layout that `write_mean` gives them.

    Args:
        tensors: Name and values of each; no tensor is kept.
        shapes: Name -> shape of all of them.
    Raises:
        NotFinite: A tensor has NaN or infinity.
        RuntimeError: A tensor is left out, comes twice, or has another shape or dtype.
        OSError: The disk is full, among others. Files whose names end in .part stay.
    """
    shards = plan_shards(shapes, dtype, limit)
    missing = {shard.file: dict(shard.tensors) for shard in shards}
    shard_of = {name: shard for shard in shards for name in shard.tensors}
    with contextlib.ExitStack() as opened:
        files = {s.file: opened.enter_context(_create(folder / (s.file + PART), s.size)) for s in shards}
        for shard in shards:
            _write_all(files[shard.file], shard.header, 0)
        for name, values in tensors:
            shard = shard_of[name]
            if name not in missing[shard.file] or (tuple(values.shape), values.dtype) != (tuple(shapes[name]), dtype):
                raise RuntimeError(f"tensor {name} comes twice, or as {values.dtype} {list(values.shape)}")
            if not is_finite(values):
                raise NotFinite(name)
            offset, _ = missing[shard.file].pop(name)
            _write_all(files[shard.file], values.contiguous().view(-1).view(torch.uint8).numpy(), offset)
            if not missing[shard.file]:
                (folder / (shard.file + PART)).rename(folder / shard.file)
                finished(folder / shard.file)
    left_out = [name for names in missing.values() for name in names]
    if left_out:
        raise RuntimeError(f"tensor {left_out[0]} was not computed ({len(left_out)} such)")
    if len(shards) > 1:
        write_json(folder / INDEX, index_of(shards))
    return shards


class Pool(ThreadPoolExecutor):
    """Threads that drop what they have not begun where the block they serve fails."""

    def __exit__(self, kind, error, traceback):
        self.shutdown(wait=True, cancel_futures=kind is not None)


def finish(tasks: Iterable[Future]) -> None:
    """Wait for tasks; raises the first error as soon as there is one."""
    done, _ = wait(list(tasks), return_when=FIRST_EXCEPTION)
    for task in done:
        task.result()


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Our threads share out the work; torch's own in each of them would only wait for a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _create(path: Path, size: int) -> Iterator[int]:
    """Descriptor of a new file of `size` bytes; raises OSError if the disk has no space for them."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        yield file
    finally:
        os.close(file)


def _write_all(file: int, content, offset: int) -> None:
    content = memoryview(content)
    while len(content):
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written
