"""Reasoning and answer of a reply, however the think block was written or cut.

A think block is structure only where the format puts it: it opens the reply, or a lone `</think>` at the start of a
line ends reasoning whose opening tag stood in the prompt. The tags anywhere else are words of the author.
"""

import re
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
_OPENING = re.compile(rf"\s*({OPEN})")
# A reasoning that talks about the tags mentions them inside its lines; the one that ends it stands at a line's edge.
_AT_EDGE = re.compile(rf"(?m)^[ \t]*({CLOSE})|({CLOSE})(?=[ \t]*(?:\r?\n|\Z))")
_AT_START = re.compile(rf"(?m)^[ \t]*({CLOSE})")


class ThinkBlock(NamedTuple):
    """A block in a reply, by places of characters.

    Attributes:
        start, end: With its tags; `end` is the end of the reply where length cut the block.
        inner_start, inner_end: Between its tags.
    """

    start: int
    inner_start: int
    inner_end: int
    end: int


def think_blocks(text: str, *, opened_in_prompt: bool = False) -> list[ThinkBlock]:
    """The blocks that open a reply, ascending; nothing but white space stands between them.

    A block of one line ends at its first `</think>`. A longer one ends at the first that begins or ends a line, and
    only where there is none at the first of all.

    Args:
        text: The reply, as decoded without its stop token.
        opened_in_prompt: The prompt ended inside a think block.
    """
    blocks, place = [], 0
    opening = _OPENING.match(text)
    if opened_in_prompt and not opening:
        blocks.append(_block(text, 0, 0))
    elif not opening and (lone := _AT_START.search(text)) and OPEN not in text[: lone.start()]:
        blocks.append(ThinkBlock(0, 0, lone.start(1), lone.end(1)))
    if blocks:
        place = blocks[-1].end
        opening = _OPENING.match(text, place)
    while opening:
        blocks.append(_block(text, opening.start(1), opening.end(1)))
        opening = _OPENING.match(text, blocks[-1].end)
    return blocks


def _block(text: str, start: int, inner_start: int) -> ThinkBlock:
    close = text.find(CLOSE, inner_start)
    if close < 0:
        return ThinkBlock(start, inner_start, len(text), len(text))
    if text.find("\n", inner_start, close) >= 0 and (edge := _AT_EDGE.search(text, inner_start)):
        close = edge.start(edge.lastindex)
    return ThinkBlock(start, inner_start, close, close + len(CLOSE))


def split_reasoning(text: str, *, opened_in_prompt: bool = False) -> tuple[str | None, str]:
    """Split a reply into its reasoning and its answer, as `think_blocks` finds them.

    The reasoning of several blocks is joined by a line break. A reply that ends inside its block was cut by length: all
    of it is reasoning. The smollm3 template renders this answer in no-think mode.

    Args: As `think_blocks`.
    Returns:
        (reasoning, answer): reasoning is None without a think block and "" for an empty one; both without the line
        breaks that set the block apart, Windows' among them.
    """
    blocks = think_blocks(text, opened_in_prompt=opened_in_prompt)
    inner = [text[block.inner_start : block.inner_end].strip("\r\n") for block in blocks]
    answer = text[blocks[-1].end :] if blocks else text
    return ("\n".join(part for part in inner if part) if inner else None), answer.lstrip("\r\n")


def ends_thinking(text: str, *, opened_in_prompt: bool = False) -> bool:
    """Whether a reply ended inside a think block, so that there is no answer; the arguments are those of
    `think_blocks`."""
    blocks = think_blocks(text, opened_in_prompt=opened_in_prompt)
    return bool(blocks) and blocks[-1].inner_end == blocks[-1].end


def reasoning_ranges(text: str) -> list[tuple[int, int]]:
    """Where a reply's reasoning stands, as `think_blocks` finds it, with its tags.

    Returns:
        [(start, end)] ascending; blocks with nothing but white space in them are left out.
    """
    return [(b.start, b.end) for b in think_blocks(text) if text[b.inner_start : b.inner_end].strip()]
