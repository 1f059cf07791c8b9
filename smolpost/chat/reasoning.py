"""Splits a reply into reasoning and answer, also if its think block is unusual or truncated.

A think block is structure only at the start of a reply. A lone `</think>` at the start of a line also ends reasoning:
its opening tag was in the prompt. Anywhere else the tags are only text.
"""

import re
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
_OPENING = re.compile(rf"\s*({OPEN})")
# Reasoning about the tags mentions them inside its lines; the tag that ends the block is at the edge of a line.
_AT_EDGE = re.compile(rf"(?m)^[ \t]*({CLOSE})|({CLOSE})(?=[ \t]*(?:\r?\n|\Z))")
_AT_START = re.compile(rf"(?m)^[ \t]*({CLOSE})")


class ThinkBlock(NamedTuple):
    """A think block of a reply, as character positions.

    Attributes:
        start, end: The block with its tags; `end` is the end of the reply if the block never closes.
        inner_start, inner_end: The text between its tags.
    """

    start: int
    inner_start: int
    inner_end: int
    end: int


def think_blocks(text: str, *, opened_in_prompt: bool = False) -> list[ThinkBlock]:
    """The blocks that open a reply, ascending; only white space is between them.

    A block of one line ends at its first `</think>`. A longer block ends at the first `</think>` that begins or ends
    a line; if there is none, at the first `</think>`.

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

    The reasoning of several blocks is joined by line breaks. If a reply ends inside a block, its length was limited and
    all of the rest is reasoning. The smollm3 template renders this answer in no-think mode.

    Args: As `think_blocks`.
    Returns:
        (reasoning, answer): reasoning is None without a think block, and "" for an empty block. Both come without the
        line breaks around the block, also Windows line breaks.
    """
    blocks = think_blocks(text, opened_in_prompt=opened_in_prompt)
    inner = [text[block.inner_start : block.inner_end].strip("\r\n") for block in blocks]
    answer = text[blocks[-1].end :] if blocks else text
    return ("\n".join(part for part in inner if part) if inner else None), answer.lstrip("\r\n")


def ends_thinking(text: str, *, opened_in_prompt: bool = False) -> bool:
    """Whether a reply ended inside a think block, so that it has no answer; arguments as `think_blocks`."""
    blocks = think_blocks(text, opened_in_prompt=opened_in_prompt)
    return bool(blocks) and blocks[-1].inner_end == blocks[-1].end


def reasoning_ranges(text: str) -> list[tuple[int, int]]:
    """The non-empty think blocks of a reply, with their tags.

    Returns:
        [(start, end)] ascending; blocks that contain only white space are left out.
    """
    return [(b.start, b.end) for b in think_blocks(text) if text[b.inner_start : b.inner_end].strip()]
