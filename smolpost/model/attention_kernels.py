"""Attention in the segments of a row, by the fastest kernel that a device has.

SDPA takes a sliding window as tiles of W queries with the W - 1 keys before them as a prefix, so work grows with L x W.
FlashAttention takes it as an argument.

L tokens per row, N query heads, K key heads (N a multiple of K), D head size.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from smolpost.model.attention_segments import Segment, cut, tiles
from smolpost.model.varlen_kernels import VarlenKernel, choose, report

# Below this many numbers in a segment's queries a kernel call costs more than its arithmetic; above, less than the
# copies that sharing it takes.
SHORT = 8192
# Queries that share a mask at the edge of a window: more of them waste arithmetic on hidden keys, fewer waste calls.
BAND = 128

_in_use: str | None = None


def kernel_name() -> str | None:
    """The kernel of this process's last packed attention, a word for logs; None before the first.

    `flash-attention-3`, `torch-varlen`, `flash-attention-2`, `cpu-flash`, or `sdpa`, which runs document by document.
    """
    return _in_use


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: tuple[Segment, ...],
    scale: float | None,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """Query [1, N, L, D], key and value [1, K, L, D] -> [1, L, N, D], by the fastest kernel there is."""
    global _in_use
    if window is not None and all(len(own) + len(prefix) <= window for own, prefix in segments):
        window = None
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # As autocast does for SDPA: other models' RoPE leaves queries and keys in fp32.
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    if device == "cpu" and not dropout and value.shape[3] == query.shape[3]:
        _in_use = "cpu-flash"
        return CPUFlash.apply(query, key, value, segments, scale, window)
    if device == "cuda":
        kernel = choose(query, value, window, dropout)
        if isinstance(kernel, VarlenKernel):
            _in_use = kernel.name
            return varlen_attention(kernel, query, key, value, segments, scale, window)
        report(kernel)
    _in_use = "sdpa"
    return segment_attention(query, key, value, segments, scale, window, dropout)


# CPU: SDPA's own kernels, called directly for the log-sum-exps that they return.


def batches(lengths: list[int], short: int) -> list[list[int]]:
    """Numbers of the segments that share a kernel call: those of one length, where it is below `short`."""
    groups = {}
    for number, length in enumerate(lengths):
        groups.setdefault(length if length < short else -number, []).append(number)
    return list(groups.values())


def per_segment(kernel: Callable, segments: tuple[Segment, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Run a kernel on each segment's part of tensors [1, heads, L, ...]; results come back as [1, L, heads, ...]."""
    lengths = [len(own) for own, _ in segments]
    parts = [x.split(lengths, dim=2) for x in tensors]
    results = [[] for _ in segments]
    for batch in batches(lengths, SHORT // (tensors[0].shape[1] * tensors[0].shape[3])):
        first, *others = batch
        found = kernel(*(torch.cat([part[i] for i in batch]) if others else part[first] for part in parts))
        for x in found:
            for i, result in zip(batch, x.transpose(1, 2).split(1), strict=True):
                results[i].append(result)
    return tuple(torch.cat(pieces, dim=1) for pieces in zip(*results, strict=True))


def reaches(
    segments: tuple[Segment, ...], window: int | None, like: torch.Tensor
) -> Iterator[tuple[range, range, torch.Tensor | None]]:
    """Queries that see a prefix, its keys, and a mask to add to their scores; None where each query sees all keys."""
    band = None
    for own, prefix in segments:
        if not prefix:  # the kernels crash without keys
            continue
        if window is None or len(own) + len(prefix) <= window:
            yield own, prefix, None
            continue
        if band is None:
            # With each query the window leaves one more key behind, until the last of a full tile sees no prefix.
            band = like.new_full((min(BAND, window - 1), window - 1), float("-inf")).tril(-1)
        for first in range(0, min(len(own), window - 1), BAND):
            most = window - 1 - first  # keys that the first of these queries sees
            queries, keys = own[first : min(first + BAND, window - 1)], prefix[max(0, len(prefix) - most) :]
            yield queries, keys, band[: len(queries), most - len(keys) : most]


class CPUFlash(torch.autograd.Function):
    """Attention in a row's segments: query [1, N, L, D], key and value [1, K, L, D] -> [1, L, N, D]."""

    @staticmethod
    def forward(ctx, query, key, value, segments, scale, window=None):
        # The kernels take the last stride for 1 without looking.
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        segments = tiles(segments, window)

        def flash(q, k, v, causal=True, mask=None):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, attn_mask=mask, scale=scale
            )

        output, logsumexp = per_segment(flash, segments, query, key, value)
        for own, prefix, mask in reaches(segments, window, query):
            parts = cut(query, own), cut(key, prefix), cut(value, prefix)
            attended, total = (x.transpose(1, 2) for x in flash(*parts, causal=False, mask=mask))
            # One softmax over two sets of keys: each set's output counts by its share of the denominator.
            own_attended, own_total = cut(output, own, dim=1), cut(logsumexp, own, dim=1)
            share = (total - own_total).sigmoid()[..., None]
            own_attended.copy_(own_attended.to(share.dtype).lerp(attended.to(share.dtype), share))
            own_total.copy_(own_total.logaddexp(total))
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, output, logsumexp = ctx.saved_tensors
        gradient, output, logsumexp = (x.transpose(1, 2) for x in (gradient, output, logsumexp))

        def differentiate(g, o, total, q, k, v, causal=True, mask=None):
            # Given the output and log-sum-exp over all keys, the kernel finds the weights that these keys had.
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, o, total, 0.0, causal, attn_mask=mask, scale=ctx.scale
            )

        row = gradient, output, logsumexp, query, key, value
        gradients = [x.transpose(1, 2) for x in per_segment(differentiate, ctx.segments, *row)]
        for own, prefix, mask in reaches(ctx.segments, ctx.window, query):
            spans = own, own, own, own, prefix, prefix
            found = differentiate(*map(cut, row, spans), causal=False, mask=mask)
            for whole, part, span in zip(gradients, found, (own, prefix, prefix), strict=True):
                cut(whole, span).add_(part)
        return *gradients, None, None, None


# CUDA: one call of FlashAttention for the row.


@lru_cache(maxsize=8)
def varlen_index(segments: tuple[Segment, ...], device: torch.device) -> tuple[torch.Tensor | None, ...]:
    """Indices for FlashAttention, made once for all layers.

    Returns:
        Token of each key with every prefix repeated before its segment, or None where that changes nothing; ends of
        the segments' queries and of their keys, each int32 [segments + 1] from 0; most queries and most keys.
    """

    def on_device(numbers, dtype):
        # Pinned memory travels without the host waiting for the device.
        return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    num_queries = [len(own) for own, _ in segments]
    num_keys = [len(prefix) + len(own) for own, prefix in segments]
    ends = [on_device([0, *accumulate(counts)], torch.int32) for counts in (num_queries, num_keys)]
    tokens = None
    if num_keys != num_queries:
        tokens = on_device([token for own, prefix in segments for token in (*prefix, *own)], torch.int64)
    return tokens, *ends, max(num_queries), max(num_keys)


def varlen_attention(
    kernel: VarlenKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: tuple[Segment, ...],
    scale: float | None,
    window: int | None = None,
) -> torch.Tensor:
    """Query [1, N, L, D], key and value [1, K, L, D], fp16 or bf16 -> [1, L, N, D]."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    tokens, *index = varlen_index(segments, query.device)
    if tokens is not None:
        key, value = key.index_select(0, tokens), value.index_select(0, tokens)
    # FlashAttention (2.1 on, and torch's copy) aligns the causal diagonal to the bottom right: where the keys begin
    # with a prefix, query i sees all of it and its own segment's keys 0 to i.
    before = -1 if window is None else window - 1
    return kernel.run(query, key, value, *index, scale=scale, window_size=(before, 0))[None]


# Anywhere: SDPA, segment by segment.


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: tuple[Segment, ...],
    scale: float | None,
    window: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Query [1, N, L, D], key and value [1, K, L, D] -> [1, L, N, D]; any device, dtype and dropout."""
    # Given as many key heads as query heads, CUDA has a kernel for fp32 that keeps no scores.
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    segments = tiles(segments, window)
    parts = [x.split([len(own) for own, _ in segments], dim=2) for x in (query, key, value)]
    outputs = []
    for (_, prefix), q, k, v in zip(segments, *parts, strict=True):
        mask = None
        if prefix:
            k, v = torch.cat((cut(key, prefix), k), dim=2), torch.cat((cut(value, prefix), v), dim=2)
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(len(prefix))
            if window is not None:
                mask = mask.triu(len(prefix) - window + 1)
        outputs.append(
            F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=mask is None, scale=scale)
        )
    return torch.cat([x.transpose(1, 2) for x in outputs], dim=1)
