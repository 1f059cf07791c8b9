"""Weighted means: a soup is the one with equal weights, a linear merge has stated ones; one flat fp32 pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from smolpost.errors import UserError
from smolpost.merging.build import Job, MethodResult, build
from smolpost.merging.checkpoint import Checkpoint
from smolpost.merging.mergekit import mean
from smolpost.merging.preflight import ENGINES, VERIFICATIONS, check_choice, check_request, check_sum, check_values
from smolpost.merging.shards import SHARD_BYTES, NotFinite, write_mean
from smolpost.merging.verify import compare_with_mean


def merge(
    inputs: list[tuple[str, Path, float]],
    base: str,
    out: Path,
    dtype: str,
    *,
    engine: str = "ours",
    verification: str = "sampled",
    allow_template_change: bool = False,
    no_tokenizer: bool = False,
    hash_weights: bool = True,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the weighted mean of checkpoints to a new folder.

    Sums run in fp32 over all inputs at once: a soup that is then merged with others is one call with the products.

    Args:
        inputs: Name for messages, checkpoint folder (a full model or a LoRA adapter) and weight of each; the weights
            sum to 1.
        base: Name of the input whose config, tokenizer and chat template the result has.
        out: Result folder; empty or absent.
        dtype: "float32", "bfloat16" or "float16", of the written weights.
        engine: "ours", or "mergekit" for its linear method; both give the same weights.
        verification: "sampled" recomputes some elements of every part of every tensor in fp64, "full" all of them.
        allow_template_change: Merge inputs whose chat templates differ; the result has the base's.
        no_tokenizer: Merge models without comparing tokenizers, which they need not have; the result has none.
        hash_weights: Keep the SHA-256 of every input and output weight file in the manifest.
        threads: Most threads at work; None: all cores, at most eight. The result does not depend on it.
        shard_bytes: Of weights per written file.
    Returns:
        `method`, `inputs` (name -> weight), `base`, `dtype`, `engine`, `num_tensors`, `num_parameters`,
        `stop_tokens` (name -> ids) and `max_position_embeddings` (name -> tokens), which may differ, `num_compared`
        (elements recomputed), `max_abs_diff` (largest distance of those from the exact mean), `correctly_rounded`
        (share of those that are the exact mean rounded to `dtype`, in [0, 1]), `read_bytes`, `written_bytes`,
        `seconds`.
    Raises:
        UserError: The inputs cannot be merged, or the result is not a working model; nothing is written.
        RuntimeError: The engine wrote something other than the mean; nothing is left behind.
        OSError: For example, the disk is full; nothing is left behind.
    """
    checkpoints = [Checkpoint(name, Path(folder), weight) for name, folder, weight in inputs]
    weights = {checkpoint.name: checkpoint.weight for checkpoint in checkpoints}
    vocabulary = "none" if no_tokenizer else "equal"
    job = Job(checkpoints, base, Path(out), dtype, allow_template_change, hash_weights, threads, vocabulary)
    check_request(checkpoints, base, job.out, dtype)
    check_sum(weights)
    check_choice("engine", engine, ENGINES)
    check_choice("verification", verification, VERIFICATIONS)

    def write(full, donor, unfinished, finished) -> MethodResult:
        if engine == "mergekit":
            check_values(full, donor.tensors)
            mean.write_mean(full, donor, unfinished, dtype, limit=shard_bytes, finished=finished)
        else:
            _write_ours(full, unfinished, dtype, threads=threads, limit=shard_bytes, finished=finished)
        return MethodResult()

    def verify(full, merged) -> dict[str, Any]:
        return compare_with_mean(full, merged, dtype, full=verification == "full")

    report = {"method": "linear", "inputs": weights, "base": base, "dtype": dtype, "engine": engine}
    return build(job, write, verify, report)


def _write_ours(
    checkpoints: list[Checkpoint],
    unfinished: Path,
    dtype: str,
    *,
    threads: int | None,
    limit: int,
    finished: Callable[[Path], None],
) -> None:
    """Our engine, with its complaints in the user's words."""
    try:
        write_mean(checkpoints, unfinished, getattr(torch, dtype), limit=limit, threads=threads, finished=finished)
    except NotFinite as error:
        [tensor] = error.args
        check_values(checkpoints, [tensor])
        raise UserError(
            f"merge result: the mean of tensor {tensor} is beyond {torch.finfo(getattr(torch, dtype)).max:g}, the "
            f"largest {dtype}; write another dtype"
        ) from error
