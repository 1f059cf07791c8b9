"""Checks before checkpoints are merged; mergekit itself would merge silently."""

import filecmp
import shutil
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path

import torch

from smolpost.errors import UserError
from smolpost.merging.architecture import architecture
from smolpost.merging.average import is_finite
from smolpost.merging.checkpoint import EMBEDDING, Checkpoint

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # per element, of the dtypes a merge can write
ENGINES = ("ours", "mergekit")
VERIFICATIONS = ("sampled", "full")
INPUT_DTYPES = ("F32", "BF16", "F16")  # exact in fp32

ALIGN = ", or state tokenizer_source in a mergekit file, which aligns vocabularies"

# A typed 0.3333 + 0.3333 + 0.3334 sums to 1 up to double rounding; a typed 0.333 three times is not meant as 0.999.
WEIGHT_TOLERANCE = 1e-6


def check_request(checkpoints: list[Checkpoint], base: str, out: Path, dtype: str) -> None:
    """Refuse names, dtype and output folder that make no merge."""
    names = [checkpoint.name for checkpoint in checkpoints]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"merge inputs name '{repeated[0]}' {names.count(repeated[0])} times; add up its weights")
    if base not in names:
        raise UserError(
            f"merge base='{base}' is not among the inputs {', '.join(names) or '(none)'}; "
            "name the input whose config, tokenizer and chat template the result has"
        )
    check_choice("dtype", dtype, BYTES)
    check_out(out)


def check_out(out: Path) -> None:
    """Refuse an output folder that holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"merge output {out} exists and is not an empty folder; name another or empty it")


def check_choice(key: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise UserError(f"merge {key}='{value}' is not known; choose one of {', '.join(known)}")


def check_sum(weights: dict[str, float]) -> None:
    """Refuse weights of a linear merge that do not sum to 1."""
    total = sum(weights.values())
    if not abs(total - 1) <= WEIGHT_TOLERANCE:  # `not <=` catches NaN
        stated = ", ".join(f"{name}={weight:g}" for name, weight in weights.items())
        raise UserError(f"merge weights {stated} sum to {total:.9g}, not 1; divide each by their sum")


def check_inputs(
    checkpoints: list[Checkpoint], base: Checkpoint, allow_template_change: bool, vocabulary: str = "equal"
) -> None:
    """Refuse inputs that are not one model: architecture, tensors, vocabulary and chat template, cheapest first.

    Args:
        vocabulary: As in `build.Job`.

    The merge itself reads the values; `check_values` reports a value that is not finite.
    """
    architectures = base.config.get("architectures") or []
    if len(architectures) != 1:
        raise UserError(
            f"merge input '{base.name}': architectures={architectures} in {base.folder / 'config.json'} must name one "
            "class; save the checkpoint with save_pretrained"
        )
    others = [checkpoint for checkpoint in checkpoints if checkpoint is not base]
    aligned = vocabulary == "aligned"
    for other in others:
        _check_config(base, other, aligned)
    for other in others:
        _check_tensors(base, other, aligned)
    if vocabulary != "none":
        for checkpoint in checkpoints:
            _check_tokenizer(checkpoint)
    if vocabulary == "equal":
        for other in others:
            _check_vocabulary(base, other)
    if vocabulary != "none" and not allow_template_change:
        for other in others:
            _check_template(base, other)
    for checkpoint in checkpoints:
        _check_stored(checkpoint)


def _check_config(base: Checkpoint, other: Checkpoint, aligned: bool) -> None:
    first, second = architecture(base.config), architecture(other.config)
    for key in sorted(first.keys() | second.keys(), key=lambda key: (key == "head_dim", key)):  # derived: said last
        mine, theirs = first.get(key), second.get(key)
        if mine != theirs and not (aligned and key == "vocab_size"):
            note = "" if key in first.keys() & second.keys() else f", or delete {key} if it is only a tool's note"
            raise UserError(
                f"merge inputs '{base.name}' and '{other.name}' differ in config.json: {key}={mine} and {theirs}; "
                f"merge only checkpoints with the same architecture{ALIGN if key == 'vocab_size' else note}"
            )


def _check_tensors(base: Checkpoint, other: Checkpoint, aligned: bool) -> None:
    for here, there in ((base, other), (other, base)):
        missing = sorted(here.tensors.keys() - there.tensors.keys())
        if missing:
            raise UserError(
                f"merge inputs '{base.name}' and '{other.name}' differ: tensor {missing[0]} is in '{here.name}' and "
                f"missing in '{there.name}' ({len(missing)} such); save both with save_pretrained"
            )
    for name, tensor in base.tensors.items():
        mine, theirs = list(tensor.shape), list(other.tensors[name].shape)
        rows = [mine[:1], theirs[:1]] == [[c.config.get("vocab_size")] for c in (base, other)]
        if mine != theirs and not (aligned and rows and mine[1:] == theirs[1:]):
            raise UserError(
                f"merge inputs '{base.name}' and '{other.name}' differ: tensor {name} has shape {mine} and {theirs}; "
                "merge only checkpoints with the same architecture and vocabulary size"
            )


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    if not any((checkpoint.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"merge input '{checkpoint.name}' has no tokenizer.json ({checkpoint.folder}), so that vocabularies cannot "
            "be compared; save its tokenizer there with save_pretrained, or merge without tokenizers: --no-tokenizer"
        )


def _check_vocabulary(base: Checkpoint, other: Checkpoint) -> None:
    # The base's is always read, so that a broken one is noticed; reading one of 128k tokens takes half a second.
    if (base.vocabulary and _same_bytes(base, other, "tokenizer.json")) or base.vocabulary == other.vocabulary:
        return
    tokens = sorted(base.vocabulary.keys() | other.vocabulary.keys())
    token = next(t for t in tokens if base.vocabulary.get(t) != other.vocabulary.get(t))
    mine, theirs = (c.vocabulary.get(token, "none") for c in (base, other))
    raise UserError(
        f"merge inputs '{base.name}' and '{other.name}' differ in tokenizer.json: token {token!r} has id {mine} and "
        f"{theirs}; merge only checkpoints with the same tokenizer{ALIGN}"
    )


def _same_bytes(base: Checkpoint, other: Checkpoint, name: str) -> bool:
    mine, theirs = base.folder / name, other.folder / name
    return mine.exists() and theirs.exists() and filecmp.cmp(mine, theirs, shallow=False)


def _check_template(base: Checkpoint, other: Checkpoint) -> None:
    mine, theirs = base.chat_templates, other.chat_templates
    differing = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    if differing:
        name = differing[0]
        raise UserError(
            f"merge inputs '{base.name}' and '{other.name}' differ in their chat template ({name}: "
            f"{_shown(mine.get(name), theirs.get(name))}); merge checkpoints trained with one template, "
            "or allow it with allow_template_change=True (--allow-template-change): the result has the template of "
            f"'{base.name}'"
        )


def _shown(mine: str | None, theirs: str | None) -> str:
    """The first line in which two templates differ, of each."""
    if mine is None or theirs is None:
        return f"{'none' if mine is None else 'one'} and {'none' if theirs is None else 'one'}"
    pairs = zip_longest(mine.splitlines(), theirs.splitlines(), fillvalue="")
    # Equal lines are left where only the line ends differ.
    number, lines = next(((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1]), (1, (mine, theirs)))
    return f"line {number} is {' and '.join(repr(line.strip()[:60]) for line in lines)}"


def _check_stored(checkpoint: Checkpoint) -> None:
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype not in INPUT_DTYPES:
            raise UserError(
                f"merge input '{checkpoint.name}': tensor {name} is {tensor.dtype}, not one of "
                f"{', '.join(INPUT_DTYPES)}; merge the unquantized checkpoint"
            )
        if not tensor.num_elements:
            raise UserError(
                f"merge input '{checkpoint.name}': tensor {name} has shape {list(tensor.shape)}, no element; "
                "gather the weights before saving (ZeRO-3: zero3_save_16bit_model)"
            )
    head = checkpoint.tied_copy
    if head and any(not torch.equal(*pair) for pair in zip(*map(checkpoint.chunks, (head, EMBEDDING)), strict=True)):
        raise UserError(
            f"merge input '{checkpoint.name}': tie_word_embeddings=true, but {head} is not {EMBEDDING} "
            f"({checkpoint.folder}); save it with save_pretrained"
        )


def check_values(checkpoints: list[Checkpoint], tensors: Iterable[str]) -> None:
    """Refuse inputs of which one of the tensors holds a value that is not finite."""
    for name in tensors:
        for checkpoint in checkpoints:
            if not all(is_finite(chunk) for chunk in checkpoint.chunks(name)):
                raise UserError(
                    f"merge input '{checkpoint.name}': tensor {name} has NaN or infinity; "
                    "its training diverged; use an earlier checkpoint or train it again"
                )


def check_disk(base: Checkpoint, out: Path, dtype: str, num_adapters: int = 0) -> None:
    """Refuse an output that would not fit on its disk, with the fp32 models that adapters are merged into first."""
    elements = sum(tensor.num_elements for tensor in base.tensors.values())
    files = sum(file.stat().st_size for file in base.folder.glob("*.json"))
    needed = elements * (BYTES[dtype] + num_adapters * BYTES["float32"]) + files
    folder = next(path for path in chain([out], out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"merge output {out} needs {needed:,} bytes and {folder} has {free:,} free; "
            f"free {needed - free:,} bytes or write to another disk"
        )
