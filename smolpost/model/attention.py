"""Attention whose work grows with the documents of a packed row, not with the row.

`attn_implementation="documents"` makes the packed rows of training cheap: a row of L tokens in documents of lengths
n_i costs sum(n_i^2) instead of L^2, and no L x L mask is built. Rows with padding or a KV cache (evaluation,
generation, TRL's padded preference batches) go through transformers' SDPA with its ordinary mask.

B rows, L tokens per row, N query heads, K key heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "documents"


def documents_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document.

    Args:
        query: [B, N, L, D]; key and value: [B, K, S, D].
        attention_mask: From `documents_mask`; None where there is neither padding nor a cache.
        position_ids: [1 or B, L]; 0 begins a document.
    Returns:
        [B, L, N, D], and None: probabilities are not kept.
    Raises:
        ValueError: Packed documents in a batch of several rows, or under a sliding window.
    """
    lengths = None
    if attention_mask is None and position_ids is not None and query.shape[2] == key.shape[2]:
        lengths = document_lengths(position_ids)
    if lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[0] > 1:
        raise ValueError(f"packed documents in a batch of {query.shape[0]} rows; flatten the batch into one row")
    if sliding_window is not None:
        raise ValueError(f"attn_implementation={NAME} has no sliding window; use sdpa for this model")
    outputs: list[torch.Tensor | None] = [None] * len(lengths)
    parts = [tensor.split(lengths, dim=2) for tensor in (query, key, value)]
    for length in sorted(set(lengths)):
        same = [i for i, n in enumerate(lengths) if n == length]
        # Documents of one length share a call: short ones are many, and a call costs more than their arithmetic.
        q, k, v = (torch.cat([part[i] for i in same]) for part in parts)
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        for i, output in zip(same, attended.split(1), strict=True):
            outputs[i] = output
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def document_lengths(position_ids: torch.Tensor) -> list[int] | None:
    """Lengths of a row's documents, or None where no row holds more than one."""
    starts = (position_ids == 0).nonzero()[:, 1]
    if len(starts) <= position_ids.shape[0]:
        return None
    ends = torch.cat((starts[1:], starts.new_tensor([position_ids.shape[1]])))
    return (ends - starts).tolist()


def documents_mask(
    q_length: int, kv_length: int, q_offset: int = 0, attention_mask: torch.Tensor | None = None, **kwargs
) -> torch.Tensor | None:
    """No mask where `documents_attention` needs none, else the one that SDPA takes."""
    if attention_mask is None and q_length == kv_length and q_offset == 0:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, q_offset=q_offset, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Make the name known to every transformers model; the mask builder, too, or padding would be ignored."""
    AttentionInterface.register(NAME, documents_attention)
    AttentionMaskInterface.register(NAME, documents_mask)
