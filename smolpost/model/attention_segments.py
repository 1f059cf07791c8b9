"""Which tokens of a packed row see each other: the row's layout as a list of segments.

B rows, L tokens per row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Segment(NamedTuple):
    """Tokens that see themselves, causally, and a prefix earlier in the row, all of it where there is no window."""

    own: range
    prefix: range  # empty where there is none


def lengths_from_positions(position_ids: torch.Tensor) -> list[int] | None:
    """Lengths of a row's documents by positions [B, L] that restart at 0; None where no row holds more than one.

    Raises:
        ValueError: Positions step back to another value than 0, as those of rejected completions do.
    """
    backwards = (position_ids[:, 1:] <= position_ids[:, :-1]) & (position_ids[:, 1:] != 0)
    if backwards.any():
        row, token = backwards.nonzero()[0].tolist()
        before, after = position_ids[row, token : token + 2].tolist()
        raise ValueError(
            f"position_ids step back from {before} to {after} at token {token + 1}, but a document begins at 0; "
            "pass pair_lengths where the row holds preference pairs"
        )
    starts = (position_ids == 0).nonzero()[:, 1]
    if len(starts) <= position_ids.shape[0]:
        return None
    ends = torch.cat((starts[1:], starts.new_tensor([position_ids.shape[1]])))
    return (ends - starts).tolist()


def find_segments(
    num_tokens: int,
    document_lengths: Sequence[int] | None = None,
    pair_lengths: Sequence[tuple[int, int, int]] | None = None,
) -> tuple[Segment, ...]:
    """Segments of a row, in its order, covering it, none of them empty.

    Raises:
        ValueError: Both lengths are given, one is negative, or they do not sum to num_tokens.
    """
    if document_lengths is not None and pair_lengths is not None:
        raise ValueError("document_lengths and pair_lengths are both given, but a row has one layout")
    name, pairs = "pair_lengths", pair_lengths
    if pair_lengths is None:
        # A document is a prompt without completions.
        name, pairs = "document_lengths", [(length, 0, 0) for length in document_lengths]
    if any(length < 0 for pair in pairs for length in pair):
        raise ValueError(f"{name} hold {min(map(min, pairs))}, but no length is below 0")
    total = sum(sum(pair) for pair in pairs)
    if total != num_tokens:
        raise ValueError(f"{name} sum to {total} tokens, but the row has {num_tokens}")
    segments, start = [], 0
    for prompt, chosen, rejected in pairs:
        fork = start + prompt + chosen
        segments.append(Segment(range(start, fork), range(0)))
        segments.append(Segment(range(fork, fork + rejected), range(start, start + prompt)))
        start = fork + rejected
    return tuple(segment for segment in segments if segment.own)


def tiles(segments: tuple[Segment, ...], window: int | None) -> tuple[Segment, ...]:
    """Segments of at most a window's length, each with the window - 1 tokens before it, or as many as there are."""
    if window is None:
        return segments
    found = []
    for own, prefix in segments:
        for start in range(own.start, own.stop, window):
            before = range(own.start, start) or prefix
            tile = range(start, min(start + window, own.stop))
            found.append(Segment(tile, before[max(0, len(before) - window + 1) :]))
    return tuple(found)


def cut(x: torch.Tensor, span: range, dim: int = 2) -> torch.Tensor:
    """View of the tokens of a span."""
    return x.narrow(dim, span.start, len(span))
