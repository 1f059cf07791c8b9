"""Memory of this machine that the process can still take, and copies of tensors in it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
# Of both versions of control groups: controller, its folder, and the files' and the entry's names.
VERSIONS = (
    ("", ".", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
BLOCK = 2**27  # elements of a block of copies: half a GiB


def free_memory() -> int:
    """Bytes that the machine and the control groups of this process (containers, schedulers) still give."""
    return min(psutil.virtual_memory().available, *_left_in_groups(Path("/proc/self/cgroup")), 2**63)


def _left_in_groups(own: Path) -> Iterator[int]:
    """Bytes below the limit of each group, from the process's own to the root; unused caches of files count as free.

    Args:
        own: The file with the paths of the process's groups.
    """
    paths = [line.split(":", 2)[1:] for line in own.read_text().splitlines()] if own.exists() else []
    for controller, place, limit, used, cache in VERSIONS:
        root = CGROUPS / place
        for path in (path for controllers, path in paths if controller in controllers.split(",")):
            group = root / path.lstrip("/")
            for folder in (group, *group.parents[: len(group.relative_to(root).parts)]):
                # The root has no limit, and a container sees its own group as the root.
                with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    most = int((folder / limit).read_text())
                    yield most - int((folder / used).read_text()) + int(facts[cache])


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
