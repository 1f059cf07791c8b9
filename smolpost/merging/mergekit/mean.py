"""mergekit's arithmetic without its input and output: it plans and computes tensors, we check, write and verify them.

`mergekit.merge.run_merge` gives its files their final names, and a config.json, before anything is checked. Here its
planner and executor yield the tensors one by one, bit for bit what `run_merge` would write.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from smolpost.errors import UserError
from smolpost.merging.checkpoint import Checkpoint
from smolpost.merging.mergekit.plan import Plan, in_users_words, planned
from smolpost.merging.shards import SHARD_BYTES, NotFinite, write_tensors


def write_mean(
    checkpoints: list[Checkpoint],
    base: Checkpoint,
    folder: Path,
    dtype: str,
    *,
    limit: int = SHARD_BYTES,
    finished: Callable[[Path], object] = lambda file: None,
) -> None:
    """Write the weighted mean of checkpoints into a folder by mergekit's linear method."""
    # mergekit refuses two inputs of one folder.
    first, weights = {}, defaultdict(float)
    for checkpoint in checkpoints:
        weights[first.setdefault(checkpoint.folder.resolve(), checkpoint).name] += checkpoint.weight
    config = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()],
        # The weights sum to 1 as they are; dividing by their fp32 sum would only add a rounding.
        "parameters": {"normalize": False},
        # Inputs become fp32 before the sum: a mean of bf16 inputs is otherwise rounded to bf16 even in a float32 file.
        "dtype": "float32",
        "out_dtype": dtype,
    }
    with planned(config, list(first.values()), base) as plan:
        write_result(plan, folder, dtype, limit=limit, finished=finished)


def write_result(
    plan: Plan,
    folder: Path,
    dtype: str,
    *,
    seed: int = 0,
    limit: int = SHARD_BYTES,
    finished: Callable[[Path], object] = lambda file: None,
) -> None:
    """Compute the tensors of a plan and write them as they come.

    Args:
        seed: Of the methods that draw numbers; mergekit's `random_seed`. The process' own generator is not moved.
    Raises:
        UserError: A tensor cannot be computed, or is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            tensors = ((name, values.to(getattr(torch, dtype))) for name, values in _computed(plan))
            write_tensors(tensors, plan.shapes, folder, getattr(torch, dtype), limit=limit, finished=finished)
        except NotFinite as error:
            raise UserError(
                f"merge result: tensor {error.args[0]} has NaN or infinity in {dtype} though its inputs are finite; "
                "change the method's parameters or write another dtype"
            ) from error


def _computed(plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    from mergekit.graph import Executor, TaskUniverse

    universe = TaskUniverse(plan.tasks.values())
    handles = [universe.get_handle(task) for task in plan.tasks.values()]
    made = {}
    if plan.vocabulary:
        task, value = plan.vocabulary
        made = {universe.get_handle(task): value}
    names = {task: name for name, task in plan.tasks.items()}
    computed = Executor(handles, cached_values=made).run()
    while True:
        with in_users_words("mergekit cannot compute the merge"):  # of parameters that a method looks at only here
            step = next(computed, None)
        if step is None:
            return
        yield names[step[0]], step[1]
