"""Attention whose work grows with the documents and pairs of a packed row, not with the row's square.

`attn_implementation="packed"` knows two layouts of one row that holds a whole batch:

- documents: each sees itself, causally, and no other;
- pairs: `prompt | chosen | rejected`, one pair after another, the positions of rejected counting on from the prompt's
  like those of chosen. Both completions see the prompt and themselves, causally; pairs do not see each other.

Either is a list of segments. `prompt | chosen` is a document like any other; rejected is a segment with a prefix, the
prompt, which thereby passes through the model once for both. Rows with padding or a KV cache (evaluation, generation)
go through transformers' SDPA with its ordinary mask.

In a layer with a sliding window of W, a token sees the last W positions of its own sequence, itself included; the
window of a rejected token reaches back into the prompt, not into chosen.

B rows, L tokens per row, S keys, N query heads, K key heads (N a multiple of K), D head size.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from smolpost.model.attention_kernels import attend
from smolpost.model.attention_segments import find_segments, lengths_from_positions

NAME = "packed"


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | int | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    document_lengths: Sequence[int] | None = None,
    pair_lengths: Sequence[tuple[int, int, int]] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document or preference pair.

    Args:
        query: [B, N, L, D]; key and value: [B, K, S, D].
        attention_mask: From `packed_mask`; None or a window where there is neither padding nor a cache.
        scaling: Factor on the scores; None: D^-0.5.
        sliding_window: Positions that a token sees, itself included, >= 1; None: all before it.
        position_ids: [1 or B, L]; 0 begins a document where neither of the lengths says so.
        document_lengths: Tokens of each document. Spares the look at position_ids, for which a GPU has to stop.
        pair_lengths: Tokens of each pair's prompt, chosen and rejected; any may be 0.
    Returns:
        [B, L, N, D], and None: probabilities are not kept.
    Raises:
        ValueError: The lengths do not fit the row, it is packed and there is more than the row (other rows, padding, a
            cache), or the model has a softcap, sinks or a position bias.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME} has no {name}; use eager for this model")
    if isinstance(attention_mask, int):
        attention_mask, sliding_window = None, attention_mask
    num_rows, _, num_tokens, _ = query.shape
    if document_lengths is None and pair_lengths is None:
        is_bare = attention_mask is None and num_tokens == key.shape[2]
        if is_bare and position_ids is not None and position_ids.ndim == 2:
            document_lengths = lengths_from_positions(position_ids)
        if document_lengths is None and is_bare and sliding_window is not None and sliding_window < num_tokens:
            # What SDPA would need a mask for: each row becomes a document.
            document_lengths = [num_tokens] * num_rows
            query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
        if document_lengths is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
    if query.shape[0] > 1:
        raise ValueError(f"packed documents in a batch of {num_rows} rows; flatten the batch into one row")
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"packed documents with padding or a KV cache ({num_tokens} queries, {key.shape[2]} keys): they would see "
            "each other; leave attention_mask and past_key_values out"
        )
    segments = find_segments(query.shape[2], document_lengths, pair_lengths)
    output = attend(query, key, value, segments, scaling, sliding_window, dropout)
    return output.unflatten(1, (num_rows, num_tokens))[0], None


def packed_mask(
    q_length: int, kv_length: int, q_offset: int = 0, attention_mask: torch.Tensor | None = None, **kwargs
) -> torch.Tensor | int | None:
    """The layer's sliding window or None where `packed_attention` needs no more, else the mask that SDPA takes.

    Some models tell only their masks of the window, not their attention function.
    """
    window = kwargs.get("local_size")
    # Chunks have a local size, too, under another name; use_vmap marks patterns that only the mask knows.
    is_chunk = window is not None and window != getattr(kwargs.get("config"), "sliding_window", None)
    is_plain = not is_chunk and not kwargs.get("use_vmap")
    if attention_mask is None and q_length == kv_length and q_offset == 0 and is_plain:
        return window
    return sdpa_mask(q_length=q_length, kv_length=kv_length, q_offset=q_offset, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Make the name known to every transformers model; the mask builder, too, or padding would be ignored."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
