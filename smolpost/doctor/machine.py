"""Devices, their attention kernel, cores, memory and disks. Each function is one look of `environment.examine`."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from smolpost import disks as writable
from smolpost.doctor.finding import Finding

GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK, NO_DISK, SHARED = 4 * GIB, 20 * GIB, GIB, GIB
HEAD = 128  # of SmolLM3-3B


def has_cuda() -> bool:
    try:
        import torch
    except (ImportError, OSError):
        return False
    return torch.cuda.is_available()


def devices() -> Iterator[Finding]:
    """torch, and the accelerators that it sees."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA is missing or another one
        text = " ".join(str(error).split())[:300]
        yield Finding("fail", "torch", f"cannot be imported ({text})", "pip install --force-reinstall torch")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    build = build if torch.version.cuda or torch.version.hip else "no CUDA"
    yield Finding("ok", "torch", f"{torch.__version__}, built with {build}")
    listed = _listed()
    if not torch.cuda.is_available():
        yield from _without_cuda(torch, listed)
        return
    for number in range(torch.cuda.device_count()):
        yield _card(torch, number)
    if listed:
        yield Finding("ok", "driver", listed[0].split(", ")[-1])
    yield from _several(torch)


def _listed() -> list[str]:
    """ "NAME, DRIVER" of the GPUs that the driver lists; [] without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    words = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _without_cuda(torch, listed: list[str]) -> Iterator[Finding]:
    if listed and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        remedy = "install torch with CUDA for this driver; https://pytorch.org/get-started lists the builds"
        yield Finding("fail", "gpu", f"nvidia-smi lists {'; '.join(listed)}, and torch sees none", remedy)
    elif torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        remedy = "use a CUDA GPU for packed training"
        yield Finding("slow", "gpu", f"{kind}: attention runs document by document there", remedy)
    else:
        value = "none: models run on the CPU in fp32, much slower than on a GPU"
        yield Finding("slow", "gpu", value, "stay with pipeline=tiny and small checkpoints, or use a GPU")


def _card(torch, number: int) -> Finding:
    card = torch.cuda.get_device_properties(number)
    capability = f"{card.major}.{card.minor}"
    name, value = f"gpu {number}", f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute capability {capability}"
    built = [arch for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    if built and not any(arch.startswith(f"sm_{card.major}") for arch in built):
        value += f"; this torch has kernels for {', '.join(built)} only"
        return Finding("fail", name, value, "install another build of torch")
    if card.major < 8:
        remedy = "set precision=fp32, or use an A100 or newer"
        return Finding("slow", name, f"{value}: no bf16 and no FlashAttention below 8.0", remedy)
    return Finding("ok", name, f"{value}, bf16")


def _several(torch) -> Iterator[Finding]:
    """How several cards reach each other."""
    count = torch.cuda.device_count()
    if count < 2:
        return
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        yield Finding("fail", "nccl", f"{count} GPUs, and this torch has no NCCL", "install torch for Linux with CUDA")
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))
    if all(torch.cuda.can_device_access_peer(0, other) for other in range(1, count)):
        yield Finding("ok", "nccl", f"{version}, {count} GPUs with access to each other's memory")
    else:
        value = f"{version}; GPU 0 cannot read all others' memory, so gradients go through the host's"
        yield Finding("slow", "nccl", value, "nvidia-smi topo -m shows the links; use cards with NVLink or peer access")


def attention() -> Iterator[Finding]:
    """The kernel that packed training will use."""
    import torch

    if not torch.cuda.is_available():
        kernel = "sdpa, document by document" if torch.accelerator.is_available() else "cpu-flash"
        yield Finding("ok", "attention", kernel)
        return
    from smolpost.model.varlen_kernels import VarlenKernel, choose

    query = torch.zeros(1, 1, 1, HEAD, dtype=torch.bfloat16, device="cuda")
    kernel = choose(query, query, None, 0.0)
    if not isinstance(kernel, VarlenKernel):
        yield Finding("slow", "attention", "sdpa, document by document", kernel)
    elif torch.cuda.get_device_capability() == (9, 0) and kernel.name != "flash-attention-3":
        remedy = "optional: install flash_attn_interface, FlashAttention 3"
        yield Finding("ok", "attention", f"{kernel.name}; FlashAttention 3 is faster on this card", remedy)
    else:
        yield Finding("ok", "attention", kernel.name)


def cores() -> Iterator[Finding]:
    """Cores of this process, and whether its threads fit them."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    value, quota = f"{number} of {os.cpu_count()}", cpu_quota(Path("/sys/fs/cgroup/cpu.max"))
    threads = os.environ.get("OMP_NUM_THREADS")
    if quota is not None and quota < number:
        remedy = f"set OMP_NUM_THREADS={max(1, int(quota))}, or give the container more"
        yield Finding("slow", "cores", f"{value}, and the container gives the time of {quota:g}", remedy)
    elif threads and threads.isdigit() and 1 < number < int(threads):
        yield Finding("slow", "cores", f"{value}, and OMP_NUM_THREADS={threads}", f"set OMP_NUM_THREADS={number}")
    else:
        yield Finding("ok", "cores", value)


def cpu_quota(file: Path) -> float | None:
    """Cores' worth of time that the control group gives; None where it gives all.

    Args:
        file: cpu.max of the group: "MICROSECONDS PERIOD", or "max PERIOD".
    """
    try:
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory() -> Iterator[Finding]:
    """Memory that the machine and its control groups still give."""
    import psutil

    from smolpost.training.host_memory import free_memory

    free, total = free_memory(), psutil.virtual_memory().total
    value = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if free < LITTLE_MEMORY:
        yield Finding("slow", "memory", value, "end other programs, or give the container more memory")
    else:
        yield Finding("ok", "memory", value)


def disks(run_dir: Path) -> Iterator[Finding]:
    """Where runs, models from the Hub and temporary files go."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    places = {"run_dir": run_dir, "HF_HOME": cache, "TMPDIR": Path(tempfile.gettempdir())}
    for name, folder in places.items():
        existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free
        value, remedy = f"{folder}: {free / GIB:.1f} GiB free", f"free some, or set {name}=FOLDER elsewhere"
        if not writable.is_writable(folder):
            yield Finding("fail", "disk", f"{folder} cannot be written", f"set {name}=FOLDER elsewhere")
        elif free < NO_DISK:
            yield Finding("fail", "disk", value, remedy)
        elif free < LITTLE_DISK:
            yield Finding("note", "disk", f"{value}; a 3B checkpoint takes 6 GB, its training state 37 GB", remedy)
        else:
            yield Finding("ok", "disk", value)


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Memory that the processes of one machine share: workers of data and NCCL."""
    if not folder.is_dir():
        return
    total = shutil.disk_usage(folder).total
    value = f"{total / GIB:.2g} GiB"
    if total < SHARED:
        remedy = "start the container with --shm-size=8g or --ipc=host"
        value += ": several GPUs or data workers can run out of it"
        yield Finding("note", "/dev/shm", value, remedy)
    else:
        yield Finding("ok", "/dev/shm", value)
