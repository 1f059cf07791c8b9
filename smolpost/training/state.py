"""Weights and AdamW's moments as unsharded fp32 tensors by parameter, for every backend.

A checkpoint in this form goes on under any backend and number of ranks.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from smolpost.errors import UserError
from smolpost.model.stored import plain_name

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's running means of the gradient and of its square
PARTS = (WEIGHT, *MOMENTS)


class State(Protocol):
    """What a backend holds of one trained parameter. All ranks call, with the parameters in one order."""

    def read(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Whole fp32 tensors of PARTS; no moments where the optimizer has not met the parameter yet."""

    def write(self, parameter: torch.nn.Parameter, parts: dict[str, torch.Tensor], steps: int) -> None:
        """Put back what `read` returned.

        Args:
            parts: On the CPU.
            steps: Optimizer steps that have been made.
        """


class TorchState:
    """One process, DDP and FSDP2: torch's own optimizer on plain tensors or DTensors."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def read(self, parameter):
        moments = self.optimizer.state.get(parameter, {})
        parts = {WEIGHT: parameter.detach()} | {name: moments[name] for name in MOMENTS if name in moments}
        return {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in parts.items()}

    @torch.no_grad()
    def write(self, parameter, parts, steps):
        placed = {name: _like(parameter, part) for name, part in parts.items()}
        parameter.copy_(placed.pop(WEIGHT))
        if placed:
            self.optimizer.state[parameter] = placed | {"step": _step(self.optimizer, steps, parameter.device)}


def _step(optimizer: torch.optim.Optimizer, steps: int, device: torch.device) -> torch.Tensor | int:
    """The number of steps as the optimizer keeps it beside its moments, which are on the device."""
    if "fused" not in optimizer.defaults:  # DeepSpeed's own AdamW, which it chooses where the moments are on the CPU
        return steps
    # The fused kernel reads the number on the device, the others on the CPU.
    return torch.tensor(float(steps), device=device if optimizer.defaults["fused"] else "cpu")


def _like(parameter: torch.nn.Parameter, part: torch.Tensor) -> torch.Tensor:
    """The whole tensor where and how the parameter lies."""
    part = part.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(part, parameter.device_mesh, parameter.placements)
    return part


class ZeroState:
    """DeepSpeed's ZeRO-1 to ZeRO-3: fp32 weights and moments in flat partitions, one part on each rank.

    DeepSpeed's own functions for this find no moments of the second group of parameters under ZeRO-2, and cannot write
    any before a first step (0.19.8). So the partitions are read and written here, at the places that DeepSpeed names.
    """

    def __init__(self, zero: object):
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

        self.zero = zero
        self.is_sharded = isinstance(zero, DeepSpeedZeroOptimizer_Stage3)
        self.partitions = zero.fp32_partitioned_groups_flat if self.is_sharded else zero.single_partition_of_fp32_groups

    @torch.no_grad()
    def read(self, parameter):
        place = self._place(parameter)
        partition = self.partitions[place.group]
        moments = self.zero.optimizer.state[partition]
        parts = {WEIGHT: partition} | {name: moments[name] for name in MOMENTS if name in moments}
        return {name: self._whole(parameter, part, place) for name, part in parts.items()}

    def _whole(self, parameter: torch.nn.Parameter, part: torch.Tensor, place: "Place") -> torch.Tensor:
        shape = parameter.ds_shape if self.is_sharded else parameter.shape
        whole = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
        mine = whole.view(-1)[place.first : place.first + place.number]
        mine.copy_(part.narrow(0, place.start, len(mine)))
        group = parameter.ds_process_group if self.is_sharded else parameter._dp_group
        torch.distributed.all_reduce(whole, group=group)
        return whole

    @torch.no_grad()
    def write(self, parameter, parts, steps):
        import deepspeed

        place = self._place(parameter)
        partition = self.partitions[place.group]
        moments = self.zero.optimizer.state[partition]
        for name, part in parts.items():
            target = partition if name == WEIGHT else moments.setdefault(name, torch.zeros_like(partition))
            mine = part.view(-1)[place.first : place.first + place.number]
            target.narrow(0, place.start, len(mine)).copy_(mine)
        if len(parts) > 1:
            moments["step"] = _step(self.zero.optimizer, steps, partition.device)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.is_sharded):
            parameter.copy_(parts[WEIGHT])

    def _place(self, parameter: torch.nn.Parameter) -> "Place":
        if self.is_sharded:  # every rank has an equal part; the last one's is padded
            group, start, number = self.zero.grad_position[self.zero.get_param_id(parameter)]
            first = torch.distributed.get_rank(parameter.ds_process_group) * number
            return Place(group, start, number, first)
        mapping = parameter._hp_mapping
        if mapping is None:  # this rank's partition has no part of it
            return Place(group=0, start=0, number=0, first=0)
        here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return Place(mapping.param_group_index, here.start, here.numel, there.start)


class Place(NamedTuple):
    """The place of this rank's part of a parameter.

    Attributes:
        group: Index of the flat partition.
        start: Of the part, in the partition.
        number: Elements of the part.
        first: Index of its first element in the flattened parameter.
    """

    group: int
    start: int
    number: int
    first: int


def state_of(trainer: Trainer) -> State:
    """The reader and writer of the state of a trainer with a prepared model.

    Raises:
        UserError: DeepSpeed is set to something other than ZeRO-1, -2 or -3, or to states on NVMe.
    """
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:
        return TorchState(getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero = trainer.model_wrapped.optimizer
    if not isinstance(zero, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3) or getattr(
        zero, "swap_optimizer", False
    ):
        raise UserError(
            f"the DeepSpeed settings make a {type(zero).__name__}, whose state cannot be saved here; set zero_stage to "
            "1, 2 or 3 and no offload to nvme, or choose accelerate=ddp or accelerate=fsdp2"
        )
    return ZeroState(zero)


def trained_parameters(trainer: Trainer) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Name, as in the unwrapped model, and parameter; frozen ones are the start checkpoint's."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield plain_name(name), parameter
