"""A linear merge from its request to the renamed result: preflight, one pass, verification, manifest, one rename.

The result appears at its place in one rename, complete or not at all. Until then its files lie in a hidden folder
beside it, which no loader takes for a model: the weights are named .part until they are whole, and config.json until
all is checked. The next merge to the same place removes what a killed one left.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from smolpost.errors import UserError
from smolpost.merging import mergekit
from smolpost.merging.adapters import base_of, is_adapter, merge_adapter
from smolpost.merging.checkpoint import Checkpoint
from smolpost.merging.files import DONATED, MANIFEST, copy_files, sync, versions, write_card, write_config
from smolpost.merging.preflight import check_disk, check_inputs, check_request, check_values
from smolpost.merging.shards import PART, SHARD_BYTES, NotFinite, Pool, default_threads, sha256, write_json, write_mean
from smolpost.merging.verify import check_model, check_tensors, compare_with_mean


def merge(
    inputs: list[tuple[str, Path, float]],
    base: str,
    out: Path,
    dtype: str,
    *,
    engine: str = "ours",
    verification: str = "sampled",
    allow_template_change: bool = False,
    hash_weights: bool = True,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the weighted mean of checkpoints to a new folder.

    Sums run in fp32 over all inputs at once: a soup of inputs that is then merged with others is one call with
    multiplied weights, which saves a rounding of the soup.

    Args:
        inputs: Name for messages, checkpoint folder (a full model or a LoRA adapter) and weight of each; the weights
            sum to 1.
        base: Name of the input whose config, tokenizer and chat template the result has.
        out: Result folder; empty or absent.
        dtype: "float32", "bfloat16" or "float16", of the written weights.
        engine: "ours", or "mergekit" for its linear method; both give the same weights.
        verification: "sampled" recomputes some elements of every part of every tensor in fp64, "full" all of them.
        allow_template_change: Merge inputs whose chat templates differ; the result has the base's.
        hash_weights: Keep the SHA-256 of every input and output weight file in the manifest.
        threads: At work at once, at most; all cores, eight at most, by default. The result does not depend on it.
        shard_bytes: Of weights per written file.
    Returns:
        `inputs` (name -> weight), `base`, `dtype`, `engine`, `num_tensors`, `num_parameters`,
        `max_position_embeddings` (name -> tokens; the one field of meaning that may differ), `num_compared` (elements
        recomputed), `max_abs_diff` (largest distance of those from the exact mean), `correctly_rounded` (share of
        those that are the exact mean rounded to `dtype`, in [0, 1]), `seconds`.
    Raises:
        UserError: The inputs cannot be merged, or make no working model; nothing is written.
        RuntimeError: The engine wrote something else than the mean; nothing is left behind.
        OSError: The disk became full, among others; nothing is left behind.
    """
    start = time.monotonic()
    out = Path(out)
    threads = threads or default_threads()
    checkpoints = [Checkpoint(name, Path(folder), weight) for name, folder, weight in inputs]
    check_request(checkpoints, base, out, dtype, engine, verification)
    [donor] = [checkpoint for checkpoint in checkpoints if checkpoint.name == base]
    adapters = {checkpoint.name: base_of(checkpoint) for checkpoint in checkpoints if is_adapter(checkpoint)}
    check_disk(adapters.get(base, donor), out, dtype, len(adapters))

    draft, models = (out.absolute().parent / f".{out.name}.{word}" for word in ("merging", "adapters"))
    for folder in (draft, models):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        full = [merge_adapter(c, models / str(i)) if c.name in adapters else c for i, c in enumerate(checkpoints)]
        [donor] = [checkpoint for checkpoint in full if checkpoint.name == base]
        check_inputs(full, donor, allow_template_change)
        draft.mkdir(parents=True)
        report = {
            "inputs": {checkpoint.name: checkpoint.weight for checkpoint in checkpoints},
            "base": base,
            "dtype": dtype,
            "engine": engine,
            "max_position_embeddings": {c.name: c.config.get("max_position_embeddings") for c in full},
        }
        # Weight files are hashed and brought to the disk while the merge goes on.
        with Pool(threads) as hashing, Pool(threads) as syncing:
            digests, syncs = {}, []

            def finished(file: Path) -> None:
                syncs.append(syncing.submit(sync, file))
                if hash_weights:
                    digests[file] = hashing.submit(sha256, file)

            if hash_weights:
                files = dict.fromkeys(file for c in full for file in c.sources or c.weight_files)
                digests |= {file: hashing.submit(sha256, file) for file in files}
            if engine == "ours":
                _write_ours(full, draft, dtype, threads, shard_bytes, finished)
            else:
                check_values(full, donor.tensors)
                mergekit.write_mean(full, donor, draft, dtype)
            merged = Checkpoint("merged", draft, config_file=f"config.json{PART}")
            config = draft / merged.config_file
            write_config(donor, config, dtype)
            if engine == "mergekit":
                for file in merged.weight_files:
                    file.chmod(config.stat().st_mode)  # safetensors writes for the owner only
                    finished(file)
            check_tensors(full, merged)
            report |= compare_with_mean(full, merged, dtype, full=verification == "full")
            check_model(merged)
            hashes = {file: digest.result() for file, digest in digests.items()}
            for task in syncs:
                task.result()
        seconds = {"seconds": time.monotonic() - start}
        copy_files(donor.folder, draft, DONATED)
        _write_manifest(draft, full, merged, hashes, report | seconds)
        sync(*draft.rglob("*"), draft)
        config.rename(draft / "config.json")
        os.replace(draft, out)
        sync(out, out.absolute().parent)
    finally:
        for folder in (draft, models):
            shutil.rmtree(folder, ignore_errors=True)
    return report | {"seconds": time.monotonic() - start}


def _write_ours(
    checkpoints: list[Checkpoint],
    draft: Path,
    dtype: str,
    threads: int,
    shard_bytes: int,
    finished: Callable[[Path], None],
) -> None:
    """Our engine, with its complaints in the user's words."""
    try:
        write_mean(checkpoints, draft, getattr(torch, dtype), limit=shard_bytes, threads=threads, finished=finished)
    except NotFinite as error:
        [tensor] = error.args
        check_values(checkpoints, [tensor])
        raise UserError(
            f"merge result: the mean of tensor {tensor} is beyond {torch.finfo(getattr(torch, dtype)).max:g}, the "
            f"largest {dtype}; write another dtype"
        ) from error


def _write_manifest(
    draft: Path, checkpoints: list[Checkpoint], merged: Checkpoint, hashes: dict[Path, str], report: dict[str, Any]
) -> None:
    """merge_manifest.json and the model card; files by name, so that they tell nothing of this machine."""

    def files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
        return {path.name: {"sha256": hashes.get(path), "bytes": path.stat().st_size} for path in paths}

    inputs = [{"name": c.name, "weight": c.weight, "files": files(c.sources or c.weight_files)} for c in checkpoints]
    content = {"method": "linear", **report, "inputs": inputs, "files": files(merged.weight_files)}
    write_json(draft / MANIFEST, content | {"versions": versions()})
    write_card(draft, content)
