"""Resumable checkpoints: which are whole, and where to go on."""

import re
import shutil
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback

WHOLE = "whole"  # marker file: every rank has written its part


class MarkWhole(TrainerCallback):
    """Marks a checkpoint once all ranks have saved it; one that a kill cut short never gets the mark."""

    def on_save(self, args, state, control, **kwargs):
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint that was saved to its end, or None."""
    whole = [c for c in _checkpoints(folder) if (c / WHOLE).exists()]
    return whole[-1] if whole else None


def remove_broken(folder: Path) -> list[str]:
    """Delete checkpoints that a kill cut short, so that none is ever taken for whole; their names."""
    broken = [c for c in _checkpoints(folder) if not (c / WHOLE).exists()]
    for checkpoint in broken:
        shutil.rmtree(checkpoint)
    return [c.name for c in broken]


def remove_all(folder: Path) -> None:
    """Delete the resumable checkpoints of a finished stage: its final weights are in the folder itself."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    found = [
        (int(m.group(1)), p) for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [path for _, path in sorted(found)]
