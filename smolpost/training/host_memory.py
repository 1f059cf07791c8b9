"""Memory of this machine that the process can still take, and copies of tensors in it."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
BLOCK = 2**27  # elements of a block of copies: half a GiB


def free_memory() -> int:
    """Bytes that the machine and the control groups of this process (containers, schedulers) still give."""
    return min(psutil.virtual_memory().available, *_left_in_groups(Path("/proc/self/cgroup")), 2**63)


def _left_in_groups(own: Path) -> Iterator[int]:
    """Bytes below the limit of each group, from the process's own to the root; caches of files count as free."""
    try:
        [path] = [line[3:] for line in own.read_text().splitlines() if line.startswith("0::/")]
    except (OSError, ValueError):
        return  # another system, or the first version of cgroups
    group = CGROUPS / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(CGROUPS):
            return
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue  # the root has no limit, and a container may not see the path
        if limit != "max":
            yield int(limit) - used + int(facts["inactive_file"])


class HostCopies:
    """Copies of tensors in fp32, in large blocks of host memory.

    Blocks are pinned for tensors of a CUDA device, so that copies do not wait: synchronize before you read them. torch
    rounds each pinned block up to a power of two, so a block for each tensor would take up to twice the memory.

    Args:
        total: Elements of all copies, at most.
    """

    def __init__(self, total: int):
        self.block = min(total, BLOCK)
        self._free = torch.empty(0)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        number = tensor.numel()
        if number > len(self._free):
            self._free = torch.empty(max(number, self.block), dtype=torch.float32, pin_memory=tensor.is_cuda)
        copy, self._free = self._free[:number].view(tensor.shape), self._free[number:]
        return copy.copy_(tensor, non_blocking=True)
