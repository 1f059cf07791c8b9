"""Prompts as long as a length allows: the largest size whose sequence has at most so many elements."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Sized = TypeVar("Sized", bound=Sequence)  # a text, or token ids

# Characters that tell how many tokens a character costs: a small part of a long prompt.
_PROBE = 8192


def largest(of_size: Callable[[int], Sized], limit: float, smallest: int, guess: int) -> tuple[int, Sized] | None:
    """The size that fits while the next one does not, by regula falsi: few sequences are made at any limit.

    Args:
        of_size: Size to its sequence, which grows with the size without end, if not with each step.
        limit: Elements of the sequence, at most.
        smallest: Size of the shortest sequence.
        guess: Where the search begins.
    Returns:
        (size, its sequence), or None where the smallest does not fit.
    """
    best = of_size(smallest)
    low = (smallest, len(best))
    high: tuple[int, int] | None = None
    if low[1] > limit:
        return None
    size, start = max(guess, smallest + 1), low
    while high is None or high[0] - low[0] > 1:
        made = of_size(size)
        if len(made) <= limit:
            low, best = (size, len(made)), made
        else:
            high = (size, len(made))
        (x, begin), (y, end) = (start, low) if high is None else (low, high)
        # Without a measured slope the sizes double.
        step = (limit - low[1]) * (y - x) / (end - begin) if end > begin else low[0] - smallest
        size = low[0] + max(1, int(step))
        size = size if high is None else min(size, high[0] - 1)
    return low[0], best


def fitted(
    text: Callable[[int], str], encode: Callable[[str], list[int]], limit: int, smallest: int = 0
) -> tuple[int, list[int]] | None:
    """`largest` for the token ids of a text; characters, which cost little to count, tell where to tokenize.

    Args:
        text: Size to text.
        encode: Text to token ids.
        limit: Tokens, at most.
        smallest: Size of the shortest text.
    Returns:
        (size, token ids), or None where the smallest does not fit.
    """
    low, best, high = smallest, encode(text(smallest)), None
    if len(best) > limit:
        return None
    start = (len(text(smallest)), len(best))
    size, made = largest(text, start[0] + _PROBE, smallest, smallest + 16)
    while high is None or high - low > 1:
        if size <= low or (high is not None and size >= high):
            size = low + 1 if size <= low else high - 1
            made = text(size)
        ids = encode(made)
        if len(ids) <= limit:
            low, best = size, ids
        else:
            high = size
        per_token = max(1, len(made) - start[0]) / max(1, len(ids) - start[1])
        # Counted from the text just measured: what is left to add or take away is a small part of it.
        size, made = largest(text, max(start[0], len(made) + (limit - len(ids)) * per_token), smallest, size)
    return low, best
