"""Tool calls in the text of a reply: <tool_call> around JSON, <code> around Python.

A block is a call only in one of three places: on lines of its own, at the start of a line with JSON inside, or at the
end of the reply. HTML's <code> inside a sentence, or a sentence about <tool_call>, is text.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

TAGS = {"xml": "tool_call", "python": "code"}  # style -> tag around its calls
ALL_TAGS = tuple(TAGS.values())
_TAG = re.compile(rf"<(/?)({'|'.join(ALL_TAGS)})>")
_TO_LINE_END = re.compile(r"[ \t]*(?:\r?\n|\Z)")


class CallBlock(NamedTuple):
    """A call as character positions: start and end include its tags, inner_start and inner_end do not."""

    start: int
    inner_start: int
    inner_end: int
    end: int
    tag: str


def call_blocks(text: str, tags: Collection[str] = ALL_TAGS) -> list[CallBlock]:
    """The blocks of a text that are calls, ascending and disjoint.

    Args:
        text: A reply, or the part of it after its think block.
        tags: The tags that count; some of ALL_TAGS.
    """
    found, inline, opened, is_passed = [], [], None, False
    for match in _TAG.finditer(text):
        closes, tag = bool(match[1]), match[2]
        if tag not in tags:
            continue
        if not closes:
            # Inside an open call, an opening tag is a word, unless the open call turned out not to be a call.
            if opened is None or is_passed or _begins_line(text, match.start()):
                opened, is_passed = match, False
        elif opened is not None and opened[2] == tag:
            block = CallBlock(opened.start(), opened.end(), match.start(), match.end(), tag)
            begins = _begins_line(text, block.start) or (found[-1:] and found[-1].end == block.start)
            ends = (
                _TO_LINE_END.match(text, block.end) or text.startswith(f"<{tag}>", block.end) or _is_json(text, block)
            )
            if ends or not begins:
                (found if begins and ends else inline).append(block)
                opened = None
            else:
                is_passed = True  # the tag is in an argument's text, or the line is prose
    # A call that follows words on its line counts if only calls come after it.
    end = _before_blanks(text, len(text))
    for block in sorted([*found, *inline], reverse=True):
        if block.end != end:
            break
        if block in inline:
            found.append(block)
        end = _before_blanks(text, block.start)
    return sorted(found)


def _is_json(text: str, block: CallBlock) -> bool:
    inner = text[block.inner_start : block.inner_end].strip()
    return block.tag == TAGS["xml"] and (inner[:1], inner[-1:]) in (("{", "}"), ("[", "]"))


def _begins_line(text: str, place: int) -> bool:
    while place and text[place - 1] in " \t":
        place -= 1
    return place == 0 or text[place - 1] == "\n"


def _before_blanks(text: str, end: int) -> int:
    while end and text[end - 1].isspace():
        end -= 1
    return end
