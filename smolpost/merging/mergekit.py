"""mergekit's arithmetic without its input and output: it plans and computes tensors, we check, write and verify them.

`mergekit.merge.run_merge` gives its files their final names, and a config.json, before anything is checked. Here its
planner and executor yield the tensors one by one, bit for bit what `run_merge` would write.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolpost.errors import UserError
from smolpost.merging.checkpoint import Checkpoint
from smolpost.merging.shards import SHARD_BYTES, NotFinite, write_tensors
from smolpost.model.stored import read_config


@dataclass(frozen=True)
class Plan:
    """What mergekit will compute.

    Attributes:
        tasks: Tensor -> the task of mergekit's graph that computes it.
        resolved: For each set of tensors that share them: `tensors` (names), `parameters` (name -> value) and
            `inputs` (input -> parameter -> value), with mergekit's defaults filled in, gradients and filters applied.
    """

    tasks: dict[str, Any]
    resolved: list[dict[str, Any]]


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
        write_result(plan, base, folder, dtype, limit=limit, finished=finished)


@contextmanager
def planned(config: dict[str, Any], checkpoints: list[Checkpoint], base: Checkpoint) -> Iterator[Plan]:
    """mergekit's plan for a configuration that names checkpoints; its tasks run inside the block.

    Args:
        config: As in a mergekit file, with names of `checkpoints` for models; not changed.
        base: Whose configuration the result has.
    Raises:
        UserError: mergekit refuses the configuration.
    """
    # Importing mergekit takes seconds; only a merge pays for it.
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache, SaveTensor
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    for checkpoint in (*checkpoints, base):
        if checkpoint.renamed:
            raise UserError(
                f"{checkpoint.who}: mergekit does not know tensor {min(checkpoint.renamed)} ({checkpoint.folder}); "
                f"give it plain names first: smolpost merge OUT {checkpoint.folder}=1"
            )
    references = _references([*checkpoints, base])
    with _without_warnings(), _without_memory():
        options = MergeOptions()
        LoaderCache().setup(options)
        try:
            stated = MergeConfiguration.model_validate(_with_references(config, references))
            architecture = get_architecture_info(stated, options)
            planner = MergePlanner(stated, architecture, options, references[base.name].config())
            # Nothing is written before a task runs. (`plan_in_memory` raises in mergekit 0.1.5.)
            saved = [task for task in planner.plan_to_disk(out_path="") if isinstance(task, SaveTensor)]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"merge method {config['merge_method']}: mergekit refuses it ({reason(error)})") from error
        # A head that is stored though tied is the embedding again.
        tasks = {task.tensor_name: task.tensor_task for task in saved if task.tensor_name in base.tensors}
        yield Plan(tasks, _resolved(tasks, {reference: name for name, reference in references.items()}))


def write_result(
    plan: Plan,
    base: Checkpoint,
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
    shapes = {name: base.tensors[name].shape for name in plan.tasks}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            tensors = ((name, values.to(getattr(torch, dtype))) for name, values in _computed(plan))
            write_tensors(tensors, shapes, folder, getattr(torch, dtype), limit=limit, finished=finished)
        except NotFinite as error:
            raise UserError(
                f"merge result: tensor {error.args[0]} holds NaN or infinity in {dtype} though its inputs are finite; "
                "change the method's parameters or write another dtype"
            ) from error


def _computed(plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    from mergekit.graph import Executor

    names = {task: name for name, task in plan.tasks.items()}
    computed = Executor(list(names)).run()
    while True:
        try:
            task, values = next(computed)
        except StopIteration:
            return
        except ValueError as error:  # of parameters that a method looks at only here
            raise UserError(f"mergekit cannot compute the merge ({reason(error)})") from error
        yield names[task], values


def _references(checkpoints: list[Checkpoint]) -> dict[str, Any]:
    """mergekit's reference to each checkpoint, by name.

    Not ModelReference.parse, which takes + and @ in a path for an adapter and a revision.
    """
    from mergekit.common import ModelPath, ModelReference

    class Folder(ModelReference, frozen=True):
        config_file: str

        def config(self, trust_remote_code: bool = False):
            # A model that an adapter was merged into keeps its config under a name that loaders do not see.
            return read_config(Path(self.model.path) / self.config_file)

    return {
        checkpoint.name: Folder(
            model=ModelPath(path=str(checkpoint.folder.resolve())), config_file=checkpoint.config_file
        )
        for checkpoint in checkpoints
    }


def _with_references(value: Any, references: dict[str, Any], key: str = "") -> Any:
    """A configuration with references in place of names of models."""
    if key in ("model", "base_model") and value is not None:
        return references[value]
    if isinstance(value, dict):
        return {k: v if k == "parameters" else _with_references(v, references, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_references(item, references) for item in value]
    return value


def _resolved(tasks: dict[str, Any], names: dict) -> list[dict[str, Any]]:
    # mergekit's maps and sets have another order in every process.
    found = {}
    for name in sorted(tasks):
        own = {names[model]: dict(sorted(values.items())) for model, values in tasks[name].input_parameters.items()}
        values = {
            "parameters": dict(sorted(tasks[name].parameters.items())),
            "inputs": {known: own[known] for known in names.values() if known in own},
        }
        found.setdefault(json.dumps(values), {"tensors": [], **values})["tensors"].append(name)
    return list(found.values())


def reason(error: Exception) -> str:
    """What an error of mergekit or pydantic says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep mergekit's progress bar and errors, drop its warnings: it has no file for SmolLM3 and says so at length."""
    root, previous = logging.getLogger(), logging.root.manager.disable
    # mergekit warns on the root logger, which installs a handler for the whole process where there is none.
    handler = logging.NullHandler()
    root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
        root.removeHandler(handler)


@contextmanager
def _without_memory() -> Iterator[None]:
    """Drop what mergekit caches per path for the life of the process: a later merge may find other weights there."""
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.io.tasks import LoaderCache

    try:
        yield
    finally:
        LoaderCache().loaders.clear()
        infer_architecture_info.cache_clear()
