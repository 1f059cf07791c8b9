"""Copies from the host to a device."""

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device; for a copy to a GPU neither the host nor the GPU's queue waits."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()  # from other memory the copy would wait for the GPU's earlier work
    return x.to(device, non_blocking=True)
