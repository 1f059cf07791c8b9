"""Weighted means of checkpoints in one model in memory: what a search over weights evaluates, without files."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smolpost.errors import UserError
from smolpost.evaluation import results
from smolpost.evaluation.run import run_task
from smolpost.evaluation.task import Item, Measurement
from smolpost.inference.local import LocalEngine
from smolpost.merging.average import Mean, is_finite
from smolpost.merging.checkpoint import CHUNK, Checkpoint
from smolpost.merging.linear import merge
from smolpost.merging.preflight import BYTES, check_choice, check_inputs, check_sum, check_values
from smolpost.progress import Progress
from smolpost.selection.measured import Evaluate

# (model, tokenizer, folder for its files) -> task -> its scores and samples, as `Evaluate` gives them.
Measure = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Path], Mapping[str, Mapping[str, Any]]]

MERGED = "merged"  # subfolder of a folder that already holds other files, in which its model is merged


class Blend:
    """A model whose weights are set to one mean of checkpoints after another.

    After `set` the model is, bit for bit, what a loader would read from the merge that `linear.merge` writes with the
    same inputs in the same order: sums in fp32, one rounding to `dtype`, then the model's own dtype. Checkpoints are
    mapped, so the memory beside the model is a few chunks.

    Args:
        inputs: Name -> checkpoint folder, full models.
        base: The input that `model` was loaded from, whose config, tokenizer and chat template a merge would have.
        model: On any device; its parameters are overwritten, its buffers are not.
        dtype: "float32", "bfloat16" or "float16", as `linear.merge` would write.
        allow_template_change: Blend inputs whose chat templates differ.
    Raises:
        UserError: The inputs cannot be merged, or are not the model's.
    """

    def __init__(
        self,
        inputs: Mapping[str, Path],
        base: str,
        model: PreTrainedModel,
        dtype: str,
        *,
        allow_template_change: bool = False,
    ):
        check_choice("dtype", dtype, BYTES)
        self._checkpoints = {name: Checkpoint(name, Path(folder)) for name, folder in inputs.items()}
        donor = self._checkpoints[base]
        check_inputs(list(self._checkpoints.values()), donor, allow_template_change)
        self._dtype = getattr(torch, dtype)
        self._parameters = dict(model.named_parameters())  # a tied head is among them once, as the embedding
        different = sorted(donor.tensors.keys() ^ self._parameters.keys())
        if different:
            place = "the model" if different[0] in self._parameters else "the checkpoint"
            raise UserError(
                f"merge input '{base}': tensor {different[0]} is in {place} only ({len(different)} such); load the "
                f"model from {donor.folder}, or save the checkpoint with save_pretrained"
            )

    @torch.no_grad()
    def set(self, weights: Mapping[str, float]) -> None:
        """Set the model to the weighted mean; an input that is not named, or has weight 0, is not read.

        Raises:
            UserError: A name is not an input, the weights do not sum to 1, or an element of the mean is NaN or
                infinite; the model then holds part of it.
        """
        unknown = sorted(weights.keys() - self._checkpoints.keys())
        if unknown:
            raise UserError(f"merge input '{unknown[0]}' is not known; choose among {', '.join(self._checkpoints)}")
        check_sum(dict(weights))
        used = {name: weight for name, weight in weights.items() if weight}
        checkpoints = [self._checkpoints[name] for name in used]
        mean = Mean(list(used.values()), self._dtype, CHUNK)
        for name, parameter in self._parameters.items():
            inputs = zip(*(checkpoint.chunks(name) for checkpoint in checkpoints), strict=True)
            for target, chunks in zip(parameter.view(-1).split(CHUNK), inputs, strict=True):
                values = mean(chunks)
                if not is_finite(values):
                    check_values(checkpoints, [name])
                    raise UserError(
                        f"merge of {', '.join(used)}: the mean of tensor {name} is beyond "
                        f"{torch.finfo(self._dtype).max:g}; write another dtype"
                    )
                target.copy_(values)


def measurer(tasks: Mapping[str, Measurement], *, batch_tokens: int, seed: int) -> Measure:
    """What measures a live model with the tasks by name; all models have one tokenizer, so prompts are made once.

    Args:
        batch_tokens, seed: As for `evaluation.run.run_task`.
    """

    items: dict[str, list[Item]] = {}

    def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, dict[str, Any]]:
        engine, found = LocalEngine(model, tokenizer), {}
        with Progress("tasks", len(tasks), "task") as progress:
            for name, task in tasks.items():
                if name not in items:
                    items[name] = task.items(tokenizer)
                scores = run_task(
                    name, task, engine, folder / name, batch_tokens=batch_tokens, seed=seed, items=items[name]
                )
                found[name] = scores | {"samples": results.samples(folder / name)}
                progress.update()
        return found

    return measure


def evaluator(
    inputs: Mapping[str, Path],
    base: str,
    dtype: str,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    measure: Measure,
) -> Evaluate:
    """What `Points` calls for each point: sets one model to the point's mean and measures it.

    Chat templates may differ: a checkpoint from before SFT, strong at long context, has another one.

    Args:
        inputs, base, dtype: As for `Blend`.
        loaded: The base's model and tokenizer.
        measure: Evaluates the model; its files go to the folder.
    """
    model, tokenizer = loaded
    blend = Blend(inputs, base, model, dtype, allow_template_change=True)

    def evaluate(weights: dict[str, float], place: Path) -> Mapping[str, Mapping[str, Any]]:
        blend.set(weights)
        return measure(model, tokenizer, place)

    return evaluate


def write_point(
    weights: Mapping[str, float], inputs: Mapping[str, Path], base: str, dtype: str, folder: Path
) -> dict[str, Any]:
    """Merge into a folder that holds other files, such as the evaluations that chose the weights.

    The folder is a model when this returns; a call that was killed can be repeated. Chat templates may differ.

    Returns:
        The merge's report.
    """
    stated = dict(weights) | {base: weights.get(base, 0.0)}  # the base gives its config even with weight 0
    used = [(name, inputs[name], weight) for name, weight in stated.items() if weight or name == base]
    merged = folder / MERGED
    shutil.rmtree(merged, ignore_errors=True)  # of a call that was killed
    report = merge(used, base, merged, dtype, verification="full", allow_template_change=True)
    for path in sorted(merged.iterdir()):
        place = folder / path.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(path, place)
    merged.rmdir()
    return report
