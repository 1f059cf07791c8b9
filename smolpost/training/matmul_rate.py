"""What a device does when it only multiplies matrices: measured once per machine and kept in the user's cache."""

import json
import os
import platform
import time
from pathlib import Path

import torch

from smolpost.files import write_json
from smolpost.training.environment import Environment

REPEATS = 8


def matmul_tflops(environment: Environment) -> float:
    """TFLOP/s of this rank's device in the training precision, from the user's cache or measured now.

    To be called before the device has other work.
    """
    device, dtype = environment.device, torch.bfloat16 if environment.bf16 else torch.float32
    file = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "smolpost" / "matmul.json"
    what = f"{device_name(environment)}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"
    if device.type == "cpu":
        what += f", {torch.get_num_threads()} threads"
    if what in (kept := _kept(file)):
        return kept[what]
    rate = measure(device, dtype)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, _kept(file) | {what: rate})
        where = f"kept in {file}"
    except OSError as error:
        where = f"not kept, as {file} cannot be written ({error.strerror})"
    print(f"{what}: {rate:.4g} TFLOP/s in matrix products, {where}", flush=True)
    return rate


def device_name(environment: Environment) -> str:
    """The accelerator's name, or the processor's on this machine."""
    if environment.device.type == "cuda":
        return torch.cuda.get_device_name(environment.device)
    return f"{environment.device.type} {platform.processor() or platform.machine()} of {platform.node()}"


def measure(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest of a few products of two square matrices. The global random state is left alone."""
    size = 1024 if device.type == "cpu" else 8192
    draw = torch.Generator(device).manual_seed(0)  # not zeros: a GPU's clocks depend on the values
    a, b = (torch.randn(size, size, generator=draw, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12


def _kept(file: Path) -> dict[str, float]:
    """What was measured before; nothing where the file cannot be read or is not ours."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {what: rate for what, rate in found.items() if isinstance(rate, float) and rate > 0}
    except (OSError, ValueError, AttributeError):
        return {}
