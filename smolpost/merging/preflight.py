"""What must hold before checkpoints are merged; mergekit itself merges in silence where it does not."""

import math
import shutil
from itertools import chain
from pathlib import Path

from smolpost.errors import UserError
from smolpost.merging.checkpoint import Checkpoint, is_finite

BYTES = {"float32": 4, "bfloat16": 2}  # per element, of the dtypes a merge can write
INPUT_DTYPES = ("F32", "BF16", "F16")  # exact in fp32

# A typed 0.3333 + 0.3333 + 0.3334 sums to 1 up to double rounding; a typed 0.333 three times is not meant as 0.999.
WEIGHT_TOLERANCE = 1e-6

# Fields that do not change what the weights mean; the result has the base's. A field not listed here must agree.
FREE_FIELDS = {
    "max_position_embeddings",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "initializer_range",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "no_rope_layer_interval",  # says nothing beside no_rope_layers, which is filled in where a file has only this
}


def check_request(checkpoints: list[Checkpoint], base: str, out: Path, dtype: str) -> None:
    """Refuse names, weights, dtype and output folder that make no merge."""
    names = [checkpoint.name for checkpoint in checkpoints]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"merge inputs name '{repeated[0]}' {names.count(repeated[0])} times; add up its weights")
    if base not in names:
        raise UserError(
            f"merge base='{base}' is not among the inputs {', '.join(names) or '(none)'}; "
            "name the input whose config, tokenizer and chat template the result has"
        )
    total = sum(checkpoint.weight for checkpoint in checkpoints)
    if not abs(total - 1) <= WEIGHT_TOLERANCE:  # `not <=` catches NaN
        weights = ", ".join(f"{checkpoint.name}={checkpoint.weight:g}" for checkpoint in checkpoints)
        raise UserError(f"merge weights {weights} sum to {total:.9g}, not 1; divide each by their sum")
    if dtype not in BYTES:
        raise UserError(f"merge dtype='{dtype}' cannot be written; choose one of {', '.join(BYTES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"merge output {out} exists and is not an empty folder; name another or empty it")


def check_inputs(checkpoints: list[Checkpoint], base: Checkpoint) -> None:
    """Refuse inputs that are not one model: architecture, tensors and vocabulary, cheapest first, then their values."""
    architectures = base.config.get("architectures") or []
    if len(architectures) != 1:
        raise UserError(
            f"merge input '{base.name}': architectures={architectures} in {base.folder / 'config.json'} must name one "
            "class; save the checkpoint with save_pretrained"
        )
    others = [checkpoint for checkpoint in checkpoints if checkpoint is not base]
    for check in (_check_config, _check_tensors, _check_vocabulary):
        for other in others:
            check(base, other)
    for checkpoint in checkpoints:
        _check_values(checkpoint)


def _check_config(base: Checkpoint, other: Checkpoint) -> None:
    for key in sorted((base.config.keys() | other.config.keys()) - FREE_FIELDS):
        mine, theirs = base.config.get(key), other.config.get(key)
        if mine != theirs:
            raise UserError(
                f"merge inputs '{base.name}' and '{other.name}' differ in config.json: {key}={mine} and {theirs}; "
                "merge checkpoints of one architecture only"
            )


def _check_tensors(base: Checkpoint, other: Checkpoint) -> None:
    for here, there in ((base, other), (other, base)):
        missing = sorted(here.tensors.keys() - there.tensors.keys())
        if missing:
            raise UserError(
                f"merge inputs '{base.name}' and '{other.name}' differ: tensor {missing[0]} is in '{here.name}' and "
                f"missing in '{there.name}' ({len(missing)} such); save both with save_pretrained"
            )
    for name, tensor in base.tensors.items():
        mine, theirs = list(tensor.shape), list(other.tensors[name].shape)
        if mine != theirs:
            raise UserError(
                f"merge inputs '{base.name}' and '{other.name}' differ: tensor {name} has shape {mine} and {theirs}; "
                "merge checkpoints of one architecture and one vocabulary size only"
            )


def _check_vocabulary(base: Checkpoint, other: Checkpoint) -> None:
    if base.vocabulary == other.vocabulary:
        return
    tokens = sorted(base.vocabulary.keys() | other.vocabulary.keys())
    token = next(t for t in tokens if base.vocabulary.get(t) != other.vocabulary.get(t))
    mine, theirs = (c.vocabulary.get(token, "none") for c in (base, other))
    raise UserError(
        f"merge inputs '{base.name}' and '{other.name}' differ in tokenizer.json: token {token!r} has id {mine} and "
        f"{theirs}; merge checkpoints of one tokenizer only"
    )


def _check_values(checkpoint: Checkpoint) -> None:
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in INPUT_DTYPES:
            raise UserError(
                f"merge input '{checkpoint.name}': tensor {name} is {tensor.dtype}, not one of "
                f"{', '.join(INPUT_DTYPES)}; merge the checkpoint from before quantization"
            )
        if not all(is_finite(chunk) for chunk in checkpoint.chunks(name)):
            raise UserError(
                f"merge input '{checkpoint.name}': tensor {name} holds NaN or infinity; "
                "its training diverged: take an earlier checkpoint or train it again"
            )


def check_disk(base: Checkpoint, out: Path, dtype: str) -> None:
    """Refuse an output that would not fit on its disk."""
    elements = sum(math.prod(tensor.shape) for tensor in base.tensors.values())
    files = sum(file.stat().st_size for file in base.folder.glob("*.json"))
    needed = elements * BYTES[dtype] + files
    folder = next(path for path in chain([out], out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"merge output {out} needs {needed:,} bytes and {folder} has {free:,} free; "
            f"free {needed - free:,} bytes or write to another disk"
        )
