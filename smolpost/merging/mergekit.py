"""A linear merge by mergekit, between a preflight of its inputs and a check of every element it wrote.

mergekit averages; everything else is ours, because it merges mismatched inputs in silence, takes a tensor missing in
one input from the other, and leaves what looks like a model behind when it is killed. The result appears at its
place in one rename, complete or not at all. It holds the weights, the base's config and the base's tokenizer files;
mergekit's README.md and mergekit_config.yml are left out: they name folders of this machine, and the run's manifest
names the inputs and weights.
"""

import json
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from smolpost.errors import UserError
from smolpost.merging.checkpoint import Checkpoint, is_finite
from smolpost.merging.preflight import check_disk, check_inputs, check_request

# All a tokenizer, its chat templates and generation defaults may consist of; what the base has of it is copied.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "generation_config.json",
)

SHARD_BYTES = 10**9  # mergekit holds a shard in memory until it is full


def merge(inputs: list[tuple[str, Path, float]], base: str, out: Path, dtype: str) -> dict[str, Any]:
    """Write the weighted mean of checkpoints to a new folder.

    Sums run in fp32 over all inputs at once: a soup of inputs that is then merged with others is one call with
    multiplied weights, which saves a rounding of the soup.

    Args:
        inputs: Name for messages, checkpoint folder and weight of each; the weights sum to 1.
        base: Name of the input whose config, tokenizer and chat template the result has.
        out: Result folder; empty or absent.
        dtype: "float32" or "bfloat16", of the written weights.
    Returns:
        `inputs` (name -> weight), `base`, `dtype`, `num_tensors`, `num_parameters`, `max_position_embeddings`
        (name -> tokens; the one field of meaning that may differ), `max_abs_diff` (largest distance of a written
        element from the exact mean), `correctly_rounded` (share of elements that are the exact mean rounded to
        `dtype`, in [0, 1]), `seconds`.
    Raises:
        UserError: The inputs cannot be merged, or make no working model; nothing is written.
        RuntimeError: mergekit wrote something else than the mean; nothing is left behind.
    """
    start = time.monotonic()
    out = Path(out)
    checkpoints = [Checkpoint(name, Path(folder), weight) for name, folder, weight in inputs]
    check_request(checkpoints, base, out, dtype)
    [donor] = [checkpoint for checkpoint in checkpoints if checkpoint.name == base]
    check_inputs(checkpoints, donor)
    check_disk(donor, out, dtype)

    draft = out.absolute().parent / f".{out.name}.merging"
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
    draft.mkdir(parents=True)
    try:
        _run_mergekit(checkpoints, donor, draft, dtype)
        _copy_base_files(donor, draft, dtype)
        measured = _compare_with_mean(checkpoints, Checkpoint("merged", draft), dtype)
        _check_model(draft)
        os.replace(draft, out)
    except BaseException:
        shutil.rmtree(draft)
        raise
    return {
        "inputs": {checkpoint.name: checkpoint.weight for checkpoint in checkpoints},
        "base": base,
        "dtype": dtype,
        "max_position_embeddings": {c.name: c.config.get("max_position_embeddings") for c in checkpoints},
        **measured,
        "seconds": time.monotonic() - start,
    }


def _run_mergekit(checkpoints: list[Checkpoint], base: Checkpoint, out: Path, dtype: str) -> None:
    """Have mergekit write the averaged weights, and a config.json that is replaced later."""
    # Importing mergekit takes seconds; only a merge pays for it.
    from mergekit.common import ModelPath, ModelReference
    from mergekit.config import InputModelDefinition, MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    def reference(checkpoint: Checkpoint) -> ModelReference:
        # Not ModelReference.parse, which takes + and @ in a path for an adapter and a revision.
        return ModelReference(model=ModelPath(path=str(checkpoint.folder.resolve())))

    # mergekit gives two inputs of one folder the first one's weight.
    weights = defaultdict(float)
    for checkpoint in checkpoints:
        weights[reference(checkpoint)] += checkpoint.weight
    config = MergeConfiguration(
        merge_method="linear",
        models=[InputModelDefinition(model=model, parameters={"weight": weight}) for model, weight in weights.items()],
        base_model=reference(base),
        # The weights sum to 1 as they are; dividing by their fp32 sum would only add a rounding.
        parameters={"normalize": False},
        # Inputs become fp32 before the sum: a mean of bf16 inputs is otherwise rounded to bf16 even in a float32 file.
        dtype="float32",
        out_dtype=dtype,
    )
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, out_shard_size=SHARD_BYTES)
    with _without_warnings(), _without_memory():
        run_merge(config, str(out), options)


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


def _copy_base_files(base: Checkpoint, out: Path, dtype: str) -> None:
    """Give the result the base's tokenizer files and config, byte for byte but for the dtype, readable by all."""
    for name in TOKENIZER_FILES:
        source = base.folder / name
        if source.is_dir():
            shutil.copytree(source, out / name, copy_function=shutil.copyfile)
        elif source.exists():
            shutil.copyfile(source, out / name)
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    # transformers wrote torch_dtype before version 5.
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in out.rglob("*"):  # safetensors writes for the owner only
        file.chmod(0o755 if file.is_dir() else 0o644)


def _compare_with_mean(checkpoints: list[Checkpoint], merged: Checkpoint, dtype: str) -> dict[str, Any]:
    """Compare every element of the merged weights with the fp64 mean of the inputs; returns what the report says.

    The tolerance is what rounding explains: half a unit of the written dtype in the mean, and one fp32 unit of the
    summands' magnitude for each rounding on the way (of every weight and every sum).
    """
    left_out = sorted(checkpoints[0].tensors.keys() - merged.tensors.keys())
    if left_out:
        raise UserError(
            f"merge inputs hold tensor {left_out[0]} ({len(left_out)} such) that their model class does not have; "
            "save them with save_pretrained"
        )
    written = getattr(torch, dtype)
    half_unit = torch.finfo(written).eps / 2
    fp32 = torch.finfo(torch.float32)
    sum_error = (len(checkpoints) + 1) * fp32.eps
    largest, exact, total = 0.0, 0, 0
    for name in merged.tensors:
        streams = [checkpoint.chunks(name) for checkpoint in checkpoints]
        for result, *chunks in zip(merged.chunks(name), *streams, strict=True):
            terms = [chunk.double().mul_(c.weight) for chunk, c in zip(chunks, checkpoints, strict=True)]
            mean = sum(terms)
            difference = (result.double() - mean).abs_()
            limit = mean.abs() * half_unit + sum(term.abs_() for term in terms) * sum_error + fp32.tiny
            if not is_finite(result) or result.dtype != written or (difference > limit).any():
                raise RuntimeError(
                    f"mergekit's tensor {name} ({result.dtype}) is not the weighted mean in {dtype}: off by up to "
                    f"{difference.max():g}"
                )
            largest = max(largest, difference.max().item())
            exact += (mean.to(written) == result).sum().item()
            total += result.numel()
    return {
        "num_tensors": len(merged.tensors),
        "num_parameters": total,
        "max_abs_diff": largest,
        "correctly_rounded": exact / total,
    }


def _check_model(folder: Path) -> None:
    """Load the merged model as any user would and run one short forward pass."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise UserError(
            f"merge inputs lack tensor {min(loading['missing_keys'])}, which {type(model).__name__} needs; "
            "save them with save_pretrained"
        )
    tokens = torch.arange(min(8, model.config.vocab_size)).unsqueeze(0)
    with torch.inference_mode():
        logits = model.eval()(input_ids=tokens).logits
    if not is_finite(logits):
        raise UserError(
            "the merged model's logits are NaN or infinite though its weights are finite; "
            "check that each input alone gives finite logits"
        )
