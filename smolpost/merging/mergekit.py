"""mergekit's linear method, selectable and the golden reference of ours."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smolpost.merging.checkpoint import Checkpoint

SHARD_BYTES = 10**9  # mergekit holds a shard in memory until it is full


def write_mean(checkpoints: list[Checkpoint], base: Checkpoint, out: Path, dtype: str) -> None:
    """Have mergekit write the weighted mean of checkpoints into a folder, and nothing beside it."""
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
    for name in ("config.json", "README.md", "mergekit_config.yml"):  # the last two name folders of this machine
        (out / name).unlink(missing_ok=True)


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
