"""Checkpoint averaging along one training run: weights for the snapshots that it left.

A training stage with `snapshot_steps` leaves full checkpoints in `snapshots/step-N`; its final weights are in the
folder itself and count as the last snapshot. Averages are merges of these, so that one pass of fp32 sums makes them,
together with everything else that a merge mixes in.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from smolpost.errors import UserError

SNAPSHOTS = "snapshots"
AVERAGES = ("final", "lawa", "ema")


def snapshots(folder: Path) -> list[tuple[int, Path]]:
    """(Optimizer step, folder) of a finished training stage's snapshots by step, its final weights last.

    A snapshot of the last step holds the final weights themselves, which count once.

    Raises:
        UserError: The stage is not finished, or has no snapshots.
    """
    try:
        final = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["report"]["steps"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder} is not a finished training stage; only those leave snapshots") from None
    named = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in (folder / SNAPSHOTS).glob("step-*"))
    found = sorted((int(match[1]), path) for match, path in named if match)
    if not found:
        raise UserError(f"{folder} has no {SNAPSHOTS}/step-N; train it with snapshot_steps=N to average along the run")
    return [*(snapshot for snapshot in found if snapshot[0] < final), (final, folder)]


def lawa(steps: Sequence[tuple[int, Path]], last: int) -> dict[Path, float]:
    """Equal weights for the last `last` snapshots: latest weight averaging, arXiv:2209.14981 and arXiv:2306.03241.

    Args:
        steps: As `snapshots` gives them.
    Raises:
        UserError: There are fewer snapshots.
    """
    if not 1 <= last <= len(steps):
        raise UserError(
            f"average_last={last} is outside [1, {len(steps)}], the snapshots of {steps[-1][1]} with its final weights"
        )
    return {folder: 1 / last for _, folder in steps[-last:]}


def ema(steps: Sequence[tuple[int, Path]], decay: float) -> dict[Path, float]:
    """Weights of the snapshots' exponential moving average.

    The average m_i = decay m_(i-1) + (1 - decay) x_i starts at m_0 = 0 and is divided by 1 - decay^n, the correction
    of that start in arXiv:1412.6980, section 3. The i-th of n snapshots then has the weight
    decay^(n - i) (1 - decay) / (1 - decay^n), and all sum to 1.

    Args:
        steps: As `snapshots` gives them. The decay is per snapshot, not per optimizer step: 0.5^(1/h) halves a weight
            every h snapshots.
        decay: In [0, 1); 0 keeps only the final weights, and near 1 all snapshots weigh the same.
    Raises:
        UserError: The decay is outside its range.
    """
    if not 0 <= decay < 1:
        raise UserError(f"ema_decay={decay:g} is outside [0, 1)")
    powers = [decay**age for age in reversed(range(len(steps)))]
    total = sum(powers)  # (1 - decay^n) / (1 - decay)
    return {folder: power / total for (_, folder), power in zip(steps, powers, strict=True)}


def averaged(
    inputs: Sequence[tuple[str, Path, float]], average: str, *, last: int, decay: float
) -> list[tuple[str, Path, float]]:
    """A merge's inputs with every one replaced by the average along its run.

    Args:
        inputs: Name, folder of a finished training stage, weight.
        average: "final" leaves them as they are, "lawa" and "ema" as above.
        last: Of lawa.
        decay: Of ema.
    Returns:
        The same for `linear.merge`; the snapshot of step N is named NAME@N, the final weights keep their name.
    """
    if average == "final":
        return list(inputs)
    found = []
    for name, folder, weight in inputs:
        steps = snapshots(folder)
        shares = lawa(steps, last) if average == "lawa" else ema(steps, decay)
        number = {path: step for step, path in steps}
        for path, share in shares.items():
            found.append((name if path == folder else f"{name}@{number[path]}", path, weight * share))
    return found
