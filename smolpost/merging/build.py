"""Builds the result folder of a merge by any method: preflight, weights, checks, manifest, one rename.

The result appears in one rename, complete or not at all. Until then its files are in a hidden folder beside it, which
no loader accepts as a model: weight files are named .part until they are complete, and config.json until everything
is checked. The next merge into the same folder removes what a killed merge left.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolpost.files import sha256, sync, workplace, write_json
from smolpost.files import verify as verify_folder
from smolpost.merging.adapters import base_of, is_adapter, merge_adapter
from smolpost.merging.checkpoint import Checkpoint
from smolpost.merging.files import DONATED, MANIFEST, PROCESSING, copy_files, versions, write_card, write_config
from smolpost.merging.preflight import check_disk, check_inputs
from smolpost.merging.shards import PART, Pool, default_threads
from smolpost.merging.stop_tokens import differing, stop_token_ids
from smolpost.merging.verify import check_model, check_tensors
from smolpost.model.loading import check_whole
from smolpost.model.stored import read_config


@dataclass(frozen=True)
class Job:
    """The settings of every merge.

    Attributes:
        checkpoints: The inputs; their names differ.
        base: Name of the input whose config, tokenizer and chat template the result has.
        out: Result folder; empty or absent.
        dtype: Of the written weights.
        allow_template_change: Merge inputs whose chat templates differ.
        vocabulary: "equal": all inputs have one, and the result has the base's tokenizer. "aligned": the method aligns
            the inputs' vocabularies and writes a tokenizer. "none": vocabularies are not compared, and the result has
            no tokenizer.
        hash_weights: Keep the SHA-256 of every input and output weight file in the manifest.
        threads: Most threads at work; None: all cores, at most eight.
    """

    checkpoints: list[Checkpoint]
    base: str
    out: Path
    dtype: str
    allow_template_change: bool
    hash_weights: bool
    threads: int | None
    vocabulary: str = "equal"


@dataclass(frozen=True)
class MethodResult:
    """What a method gives besides the weights.

    Attributes:
        report: Entries for the report.
        shapes: Tensor -> its written shape; None: the base's tensors.
        config: Dotted key of config.json -> value that replaces the base's.
        tokenizer: Writes a tokenizer or chat template that replaces the base's into a folder.
    """

    report: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[Path], object] = lambda folder: None


class WeightFiles:
    """Hashes weight files and syncs them to the disk in its own threads, while the merge continues."""

    def __init__(self, threads: int, hashed: bool):
        # Half of the threads hash: the other hashes are made during the load and forward, which leave cores free.
        self._hashing, self._syncing = Pool(max(1, threads // 2)), Pool(threads)
        self._hashed = hashed
        self._digests: dict[Path, Future[str]] = {}
        self._syncs: list[Future[None]] = []

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        for pool in (self._hashing, self._syncing):
            pool.__exit__(*error)

    def read(self, files: Iterable[Path]) -> None:
        """Hash the files of an input."""
        if self._hashed:
            for file in files:
                if file not in self._digests:
                    self._digests[file] = self._hashing.submit(sha256, file)

    def finished(self, file: Path) -> None:
        """Hash and sync a file that is written."""
        self._syncs.append(self._syncing.submit(sync, file))
        self.read([file])

    def wait(self) -> dict[Path, str]:
        """File -> SHA-256, when all are hashed and on the disk; raises the first error."""
        for task in self._syncs:
            task.result()
        return {file: digest.result() for file, digest in self._digests.items()}


def build(
    job: Job,
    write: Callable[[list[Checkpoint], Checkpoint, Path, Callable[[Path], None]], MethodResult],
    verify: Callable[[list[Checkpoint], Checkpoint], dict[str, Any]],
    report: dict[str, Any],
) -> dict[str, Any]:
    """Make the result folder of a merge.

    Args:
        write: Writes the weights. Gets the inputs as full models, the base, the folder to write to, and a function
            to call with each complete file.
        verify: Checks the written weights. Gets the inputs and the result; returns entries for the report.
        report: The report's first entries.
    Returns:
        The report, with `donated` (what the result has from its base), `stop_tokens` (input -> ids),
        `max_position_embeddings` (input -> tokens), `num_tensors`, `num_parameters`, `read_bytes` and `written_bytes`
        of weight files, and `seconds`.
    Raises:
        UserError: The inputs cannot be merged, or the result is not a working model; nothing is written.
        OSError: For example, the disk is full; nothing is left behind.
    """
    start = time.monotonic()
    adapters = {c.name: base_of(c) for c in job.checkpoints if is_adapter(c)}
    [donor] = [checkpoint for checkpoint in job.checkpoints if checkpoint.name == job.base]
    for checkpoint in job.checkpoints:
        verify_folder(checkpoint.folder)
    check_disk(adapters.get(job.base, donor), job.out, job.dtype, len(adapters))
    with workplace(job.out) as work:
        unfinished, models = work / "out", work / "adapters"
        full = [merge_adapter(c, models / str(i)) if c.name in adapters else c for i, c in enumerate(job.checkpoints)]
        [donor] = [checkpoint for checkpoint in full if checkpoint.name == job.base]
        check_inputs(full, donor, job.allow_template_change, job.vocabulary)
        # The others have the same tensors.
        config = read_config(donor.folder / donor.config_file, donor.who)
        check_whole(donor.folder, config, donor.who, own_class=True)
        if line := differing(full, donor):
            print(line, flush=True)
        unfinished.mkdir()
        merged = Checkpoint("merged", unfinished, config_file=f"config.json{PART}")
        with WeightFiles(job.threads or default_threads(), job.hash_weights) as files:
            for checkpoint in full:
                files.read(checkpoint.sources or checkpoint.weight_files)
            made = write(full, donor, unfinished, files.finished)
            report = report | made.report
            write_config(donor, unfinished / merged.config_file, job.dtype, made.config)
            shapes = made.shapes or {name: tensor.shape for name, tensor in donor.tensors.items()}
            check_tensors(shapes, merged, job.dtype)
            report |= verify(full, merged) | {"donated": _donated(job, report)}
            check_model(merged)
            hashes = files.wait()
        report |= _counts(full, merged) | {"seconds": time.monotonic() - start}
        copy_files(donor.folder, unfinished, DONATED if job.vocabulary == "equal" else PROCESSING)
        made.tokenizer(unfinished)
        _write_manifest(unfinished, full, merged, hashes, report)
        sync(*unfinished.rglob("*"), unfinished)
        (unfinished / merged.config_file).rename(unfinished / "config.json")
        os.replace(unfinished, job.out)  # fails where something came to lie there since it was checked
        sync(job.out, job.out.absolute().parent)
    return report | {"seconds": time.monotonic() - start}


def _donated(job: Job, report: dict[str, Any]) -> list[str]:
    """What the result has of its base."""
    if job.vocabulary != "equal":
        return ["config"]
    return ["config", "tokenizer", *([] if "chat_template" in report else ["chat template"])]


def _counts(checkpoints: list[Checkpoint], merged: Checkpoint) -> dict[str, Any]:
    read = {file for checkpoint in checkpoints for file in checkpoint.weight_files}
    return {
        "stop_tokens": {c.name: stop_token_ids(c) for c in checkpoints},
        "max_position_embeddings": {c.name: c.config.get("max_position_embeddings") for c in checkpoints},
        "num_tensors": len(merged.tensors),
        "num_parameters": sum(tensor.num_elements for tensor in merged.tensors.values()),
        "read_bytes": sum(file.stat().st_size for file in read),
        "written_bytes": sum(file.stat().st_size for file in merged.weight_files),
    }


def _write_manifest(
    unfinished: Path, checkpoints: list[Checkpoint], merged: Checkpoint, hashes: dict[Path, str], report: dict[str, Any]
) -> None:
    """Write merge_manifest.json and the model card; files are named without their paths on this machine."""

    def files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
        return {path.name: {"sha256": hashes.get(path), "bytes": path.stat().st_size} for path in paths}

    inputs = [
        {"name": c.name, **_stated(report["inputs"][c.name]), "files": files(c.sources or c.weight_files)}
        for c in checkpoints
    ]
    content = {**report, "inputs": inputs, "files": files(merged.weight_files)}
    write_json(unfinished / MANIFEST, content | {"versions": versions()})
    write_card(unfinished, content)


def _stated(value: float | dict[str, Any]) -> dict[str, Any]:
    """What an input counts for: the weight of a linear merge, or the parameters of another method."""
    return {"parameters": value} if isinstance(value, dict) else {"weight": value}
