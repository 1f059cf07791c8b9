"""Weights with rows for new tokens in embedding and head, copied from file to file: memory for one row and a buffer."""

import json
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig

from smolpost.errors import UserError
from smolpost.files import write_json
from smolpost.model.stored import INDEX, Tensor, read_json, renames, stored_tensors
from smolpost.progress import Progress

BUFFER = 2**24  # bytes copied at a time
ROWS = 2**12  # rows summed at a time


def write_grown(folder: Path, config: PreTrainedConfig, out: Path, first: int, number: int, size: int) -> None:
    """Copy a checkpoint's weights; the embedding and a head of its own get rows for new tokens.

    A new row is the mean of the rows of the old tokens, so that a new token's logit is the mean of the old ones and the
    probabilities of old tokens hardly change (John Hewitt, "Initializing New Word Embeddings for Pretrained Language
    Models", 2021). Rows of ids that the tokenizer does not use stay as they are. All else is copied byte by byte.

    Args:
        folder: A checkpoint that `check_whole` accepts.
        out: Exists; gets files of the same names.
        first: Id of the first new token; the old ones are 0 to first - 1.
        number: Of new tokens.
        size: Rows of the new matrices; at least the old ones and first + number.
    Raises:
        UserError: The files hold no embedding, or one with fewer rows than the tokenizer has tokens.
        OSError: The disk is full, among others.
    """
    stored = stored_tensors(folder)
    names = _vocabulary_tensors(folder, config, stored)
    files = sorted({tensor.file for tensor in stored.values()})
    num_bytes = 0
    with Progress("copy weights", sum(file.stat().st_size for file in files), "byte") as progress:
        for file in files:
            means = {name: _mean(name, stored[name].file, first) for name in names if stored[name].file == file}
            num_bytes += _copy_file(file, out / file.name, means, first, number, size, progress)
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX)
        elements = [tensor.num_elements for name, tensor in stored.items() if name not in names]
        elements += [stored[name].num_elements // stored[name].shape[0] * size for name in names]
        counts = {"total_size": num_bytes, "total_parameters": sum(elements)}
        metadata = index.get("metadata") or {}
        write_json(out / INDEX, index | {"metadata": {key: counts.get(key, metadata[key]) for key in metadata}})


def _vocabulary_tensors(folder: Path, config: PreTrainedConfig, stored: dict[str, Tensor]) -> list[str]:
    """Names in the files of the tensors with a row for each token."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    grown = [model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    names = {
        name for name, value in model.named_parameters(remove_duplicate=False) if any(value is one for one in grown)
    }
    names |= {name.removeprefix(f"{model.base_model_prefix}.") for name in names}  # of a base model saved alone
    plain = renames(stored)
    found = [name for name in stored if plain.get(name, name) in names]
    if not found:
        raise UserError(f"checkpoint {folder} holds no tensor {min(names)}; only causal LMs can get new tokens")
    return found


def _mean(name: str, file: Path, first: int) -> bytes:
    """The mean of the first rows of a tensor, summed in fp64 and rounded to the stored dtype.

    Raises:
        UserError: It has fewer rows.
    """
    with safe_open(file, "pt") as opened:
        rows = opened.get_slice(name)
        if rows.get_shape()[0] < first:
            raise UserError(
                f"{file}: {name} has {rows.get_shape()[0]:,} rows, and the tokenizer has {first:,} tokens; give the "
                "checkpoint its own tokenizer"
            )
        # An add of fp64 sums of chunks: the whole matrix in fp64 would take gigabytes.
        total = sum(rows[i : min(i + ROWS, first)].double().sum(0) for i in range(0, first, ROWS))
        mean = (total / first).to(rows[:1].dtype)
    return mean.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _copy_file(
    file: Path, out: Path, means: dict[str, bytes], first: int, number: int, size: int, progress: Progress
) -> int:
    """Copy a safetensors file, whose tensors in `means` get new rows; the bytes of its tensors.

    Args:
        means: Tensor -> bytes of a new row.
    """
    with open(file, "rb") as source, open(out, "xb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        begin = source.tell()
        metadata = {"__metadata__": header.pop("__metadata__")} if "__metadata__" in header else {}
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        written, place = {}, 0
        for name, entry in entries:
            shape = [size, *entry["shape"][1:]] if name in means else entry["shape"]
            start, end = entry["data_offsets"]
            num_bytes = len(means[name]) * size if name in means else end - start
            written[name] = {**entry, "shape": shape, "data_offsets": [place, place + num_bytes]}
            place += num_bytes
        text = json.dumps(metadata | written, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors' bytes are aligned
        target.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries:
            start, end = (begin + offset for offset in entry["data_offsets"])
            if name not in means:
                _copy(source, target, start, end, progress)
                continue
            row = means[name]
            after = start + (first + number) * len(row)
            _copy(source, target, start, start + first * len(row), progress)
            target.write(row * number)
            _copy(source, target, after, end, progress)
            target.write(row * (size - max(entry["shape"][0], first + number)))
    return place


def _copy(source: BinaryIO, target: BinaryIO, start: int, end: int, progress: Progress) -> None:
    """Copy the bytes from start to end, if there are any."""
    source.seek(start)
    while (left := end - source.tell()) > 0:
        chunk = source.read(min(BUFFER, left))
        target.write(chunk)
        progress.update(len(chunk))
