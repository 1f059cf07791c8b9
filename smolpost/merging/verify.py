"""What is checked after a merge: tensors, finite values, elements against the fp64 mean, the model loaded and run."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig

from smolpost.errors import UserError
from smolpost.merging.average import is_finite
from smolpost.merging.checkpoint import CHUNK, Checkpoint
from smolpost.merging.shards import SAFETENSORS_NAMES
from smolpost.model.loading import load_model
from smolpost.model.stored import read_config

SAMPLE_SPAN = CHUNK // 16  # one element of each span is drawn
SAMPLE_LEAST = 64  # of each tensor, or all it has


def compare_with_mean(checkpoints: list[Checkpoint], merged: Checkpoint, dtype: str, *, full: bool) -> dict[str, Any]:
    """Compare elements of the merged weights with the fp64 mean of the inputs; returns what the report says.

    The tolerance is what rounding explains: half a unit of the written dtype in the mean, and one fp32 unit of the
    summands' magnitude for each rounding on the way (of every weight and every sum).

    Args:
        full: Every element; else a fixed sample: one of every span of each tensor, its first and its last.
    Raises:
        RuntimeError: An element is off by more than rounding explains, or its dtype is another.
    """
    written = getattr(torch, dtype)
    unit, least = torch.finfo(written).eps / 2, torch.finfo(written).tiny * torch.finfo(written).eps
    fp32 = torch.finfo(torch.float32)
    sum_error = (len(checkpoints) + 1) * fp32.eps
    largest, exact, compared = 0.0, 0, 0
    for name in merged.tensors:
        draw = _all if full else _sample
        streams = [draw(name, checkpoint.values(name)) for checkpoint in (merged, *checkpoints)]
        for result, *chunks in zip(*streams, strict=True):
            terms = [chunk.double().mul_(c.weight) for chunk, c in zip(chunks, checkpoints, strict=True)]
            mean = sum(terms)
            difference = (result.double() - mean).abs_()
            limit = mean.abs() * unit + sum(term.abs_() for term in terms) * sum_error + least + fp32.tiny
            if not is_finite(result) or result.dtype != written or (difference > limit).any():
                raise RuntimeError(
                    f"the merge's tensor {name} ({result.dtype}) is not the weighted mean in {dtype}: off by up to "
                    f"{difference.max():g}"
                )
            largest = max(largest, difference.max().item())
            exact += (mean.to(written) == result).sum().item()
            compared += result.numel()
    return {
        "num_compared": compared,
        "max_abs_diff": largest,
        "correctly_rounded": exact / compared,
    }


def _all(name: str, values: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from values.split(CHUNK)


def _sample(name: str, values: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same elements of every checkpoint's tensor `name`."""
    number = values.numel()
    drawn = min(number, max(SAMPLE_LEAST, number // SAMPLE_SPAN))
    seeded = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    offsets = torch.rand(drawn, generator=seeded, dtype=torch.float64)
    places = ((torch.arange(drawn) + offsets) * (number / drawn)).long().clamp_(max=number - 1)
    places[0], places[-1] = 0, number - 1
    yield values[places]


def check_tensors(shapes: dict[str, tuple[int, ...]], merged: Checkpoint, dtype: str) -> None:
    """Refuse a result that does not hold the tensors it should, each in its shape and the written dtype."""
    stored = SAFETENSORS_NAMES[getattr(torch, dtype)]
    for name in sorted(shapes.keys() | merged.tensors.keys()):
        tensor, shape = merged.tensors.get(name), shapes.get(name)
        if tensor is None or shape is None or (tensor.shape, tensor.dtype) != (tuple(shape), stored):
            wrote = f"as {tensor.dtype} {list(tensor.shape)}" if tensor else "not at all"
            raise RuntimeError(f"the merge wrote tensor {name} {wrote}; due was {stored} {list(shape or ())}")


def check_finite(merged: Checkpoint) -> None:
    """Refuse a result that has NaN or infinity; every element is read back from its file."""
    for name in merged.tensors:
        if not all(is_finite(chunk) for chunk in merged.chunks(name)):
            raise RuntimeError(f"the merge's tensor {name} has NaN or infinity")


def check_model(merged: Checkpoint) -> None:
    """Load the merged model as any user would and run one short forward pass.

    Raises:
        UserError: Tensors are missing or left over, the head is not tied as the config says, or logits are not finite.
    """
    who = "merge result"
    config = read_config(merged.folder / merged.config_file, who)
    if config.is_encoder_decoder:
        raise UserError(f"merge result: {config.architectures[0]} is not a causal LM; merge decoders only")
    model = load_model(
        merged.folder, config=config, who=who, own_class=True, generation_config=GenerationConfig(), dtype="auto"
    )
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is not None and (embedding is head.weight) != bool(config.tie_word_embeddings):
        raise RuntimeError(
            f"the merged model's head is {'' if embedding is head.weight else 'not '}its embedding, but its config has "
            f"tie_word_embeddings={config.tie_word_embeddings}"
        )
    tokens = torch.arange(min(8, embedding.shape[0])).unsqueeze(0)
    with torch.inference_mode():
        logits = model.eval()(input_ids=tokens).logits
    if not is_finite(logits):
        raise UserError(
            "the merged model's logits are NaN or infinite though its weights are finite; "
            "check that each input alone gives finite logits"
        )
