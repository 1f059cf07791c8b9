"""From a merge's inputs to its result folder, whatever the method: preflight, weights, checks, manifest, one rename.

The result appears at its place in one rename, complete or not at all. Until then its files lie in a hidden folder
beside it, which no loader takes for a model: the weights are named .part until they are whole, and config.json until
all is checked. The next merge to the same place removes what a killed one left.
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
    """What every merge states.

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
        threads: At work at once, at most; None for all cores, eight at most.
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
class Made:
    """What a method made beside the weights.

    Attributes:
        report: What the report says of it.
        shapes: Tensor -> shape of what was written; None: the base's tensors.
        config: Dotted key of config.json -> its value in place of the base's.
        tokenizer: Writes what the result has in place of the base's tokenizer or chat template into a folder.
    """

    report: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[Path], object] = lambda folder: None


class WeightFiles:
    """Hashes weight files and brings them to the disk in threads of its own, while the merge goes on."""

    def __init__(self, threads: int, hashed: bool):
        # Half of them hash: the rest of the hashes is made beside the load and forward, which fill no two cores.
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
        """File -> SHA-256 once all are hashed and on the disk; raises what went wrong."""
        for task in self._syncs:
            task.result()
        return {file: digest.result() for file, digest in self._digests.items()}


def build(
    job: Job,
    write: Callable[[list[Checkpoint], Checkpoint, Path, Callable[[Path], None]], Made],
    verify: Callable[[list[Checkpoint], Checkpoint], dict[str, Any]],
    report: dict[str, Any],
) -> dict[str, Any]:
    """Make the result folder of a merge.

    Args:
        write: Writes the weights, given the inputs as full models, the base among them, the folder to write to and
            what to call with each file that is whole.
        verify: Checks the written weights, given the inputs and the result; returns what the report says of it.
        report: What the report says from the start.
    Returns:
        The report: also `donated` (what the result has of its base), `stop_tokens` (input -> ids),
        `max_position_embeddings` (input -> tokens), `num_tensors`, `num_parameters`, `read_bytes` and `written_bytes`
        of weight files, and `seconds`.
    Raises:
        UserError: The inputs cannot be merged, or make no working model; nothing is written.
        OSError: The disk became full, among others; nothing is left behind.
    """
    start = time.monotonic()
    adapters = {c.name: base_of(c) for c in job.checkpoints if is_adapter(c)}
    [donor] = [checkpoint for checkpoint in job.checkpoints if checkpoint.name == job.base]
    for checkpoint in job.checkpoints:
        verify_folder(checkpoint.folder)
    check_disk(adapters.get(job.base, donor), job.out, job.dtype, len(adapters))
    with workplace(job.out) as work:
        draft, models = work / "out", work / "adapters"
        full = [merge_adapter(c, models / str(i)) if c.name in adapters else c for i, c in enumerate(job.checkpoints)]
        [donor] = [checkpoint for checkpoint in full if checkpoint.name == job.base]
        check_inputs(full, donor, job.allow_template_change, job.vocabulary)
        # The others have the same tensors.
        config = read_config(donor.folder / donor.config_file, donor.who)
        check_whole(donor.folder, config, donor.who, own_class=True)
        if line := differing(full, donor):
            print(line, flush=True)
        draft.mkdir()
        merged = Checkpoint("merged", draft, config_file=f"config.json{PART}")
        with WeightFiles(job.threads or default_threads(), job.hash_weights) as files:
            for checkpoint in full:
                files.read(checkpoint.sources or checkpoint.weight_files)
            made = write(full, donor, draft, files.finished)
            report = report | made.report
            write_config(donor, draft / merged.config_file, job.dtype, made.config)
            shapes = made.shapes or {name: tensor.shape for name, tensor in donor.tensors.items()}
            check_tensors(shapes, merged, job.dtype)
            report |= verify(full, merged) | {"donated": _donated(job, report)}
            check_model(merged)
            hashes = files.wait()
        report |= _counts(full, merged) | {"seconds": time.monotonic() - start}
        copy_files(donor.folder, draft, DONATED if job.vocabulary == "equal" else PROCESSING)
        made.tokenizer(draft)
        _write_manifest(draft, full, merged, hashes, report)
        sync(*draft.rglob("*"), draft)
        (draft / merged.config_file).rename(draft / "config.json")
        os.replace(draft, job.out)  # fails where something came to lie there since it was checked
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
    draft: Path, checkpoints: list[Checkpoint], merged: Checkpoint, hashes: dict[Path, str], report: dict[str, Any]
) -> None:
    """merge_manifest.json and the model card; files by name, so that they tell nothing of this machine."""

    def files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
        return {path.name: {"sha256": hashes.get(path), "bytes": path.stat().st_size} for path in paths}

    inputs = [
        {"name": c.name, **_stated(report["inputs"][c.name]), "files": files(c.sources or c.weight_files)}
        for c in checkpoints
    ]
    content = {**report, "inputs": inputs, "files": files(merged.weight_files)}
    write_json(draft / MANIFEST, content | {"versions": versions()})
    write_card(draft, content)


def _stated(value: float | dict[str, Any]) -> dict[str, Any]:
    """What an input counts for: the weight of a linear merge, or the parameters of another method."""
    return {"parameters": value} if isinstance(value, dict) else {"weight": value}
