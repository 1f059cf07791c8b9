"""What this process runs on: accelerator or CPU, which rank of how many, in which precision."""

import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from smolpost.errors import UserError


@dataclass(frozen=True)
class Environment:
    rank: int
    world_size: int
    local_world_size: int
    use_cpu: bool
    bf16: bool

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        if self.use_cpu:
            return torch.device("cpu")
        return torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", 0)))


def detect(precision: str) -> Environment:
    """Detect the machine and set what accelerate needs before it starts.

    The stage's precision wins over the accelerate config's `mixed_precision`, which accelerate would otherwise let
    win in silence.

    Args:
        precision: auto | bf16 | fp32.
    """
    use_cpu = not torch.accelerator.is_available()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    bf16 = precision == "bf16" or (precision == "auto" and not use_cpu)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    if use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would search for one and warn
        # accelerate launch gives every rank one thread, which leaves cores of a CPU machine idle.
        if int(os.environ.get("OMP_NUM_THREADS", 1)) == 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    return Environment(rank, world_size, local_world_size, use_cpu, bf16)


def check_ranks(environment: Environment, num_processes: int) -> None:
    """Refuse ranks that are not connected: each would train alone and write into the same folder.

    Raises:
        UserError: accelerate counts fewer processes than the launcher started.
    """
    if environment.world_size != num_processes:
        raise UserError(
            f"the launcher started {environment.world_size} ranks but accelerate joined {num_processes}; "
            "launch with --config_file recipes/accelerate/ddp.yaml, zero2.yaml or zero3.yaml"
        )


def backend_name(accelerator: Accelerator) -> str:
    """As the files under recipes/accelerate are called: single, ddp, fsdp2, zero2, zero3."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    return "single" if kind == DistributedType.NO else "ddp"
