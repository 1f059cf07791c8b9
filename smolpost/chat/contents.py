"""Finds a row's own texts in its rendering, and the control tokens in them that are only text.

Usually each text occurs exactly once in the range where it can be, and that place is the answer. Otherwise the
conversation is rendered again with marks around the texts and inside the control tokens. If this rendering without its
marks equals the first one, the places of the marks are exact, whatever the template trims, drops or adds.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from smolpost.chat.controls import controls, reply_words
from smolpost.chat.fates import Fate
from smolpost.chat.render import RESULT_ROLES, Conversation, Message, part_text, text_of
from smolpost.chat.spans import Span
from smolpost.chat.text_pieces import Vocabulary
from smolpost.errors import UserError

_FATES = {"system": Fate.SYSTEM, "developer": Fate.SYSTEM, **dict.fromkeys(RESULT_ROLES, Fate.TOOL)}

# Symbols that nobody uses. Python's repr prints them as they are, unlike private-use characters.
_MARKS = [chr(code) for code in range(0x1D300, 0x1D357)]

# A template may remove these at the edges of a text: one pair of its own tags, or flags such as /no_think.
_OPEN, _CLOSE = "<tool_response>", "</tool_response>"
_FLAG = re.compile(r"/\w+(?!\S)")

# (template, whether first message, edges of a text) -> number of the range that the template shows.
_shown: dict[tuple[str, bool, tuple], int] = {}
_MAX_SHOWN = 1000

_Range = tuple[int, int]  # start and end of characters
_Key = int | tuple[str, int | None]  # index of a message, or a variable and the index in its list


class Content(NamedTuple):
    """A row's own text in the rendering.

    Attributes:
        start, end: Positions of its characters.
        fate: SYSTEM, USER or TOOL.
        message: Index of its message; None for the template's variables and tools.
    """

    start: int
    end: int
    fate: Fate
    message: int | None


class _Own(NamedTuple):
    """A text before rendering: where it comes from, and the ranges of it that the template may show."""

    key: _Key
    text: str
    fate: Fate
    ranges: list[_Range | None]  # widest first; None: the template may show nothing
    group: tuple


_Found = tuple[list[Content], list[_Range]]  # contents, and control tokens that are only text


def fate_of(role: str | None) -> Fate:
    """The fate of a role's text that does not train; not for replies."""
    return _FATES.get(role, Fate.USER)


def locate(
    conversation: Conversation, text: str, spans: list[Span], vocabulary: Vocabulary, *, exact: bool
) -> tuple[list[Content] | None, list[_Range]]:
    """The row's own texts, except replies.

    Args:
        conversation: A `smolpost.chat.render.Conversation`.
        text: Its rendering.
        spans: [smolpost.chat.spans.Span] of its replies.
        vocabulary: `smolpost.chat.text_pieces.Vocabulary`.
        exact: Render with marks even if a text occurs once.
    Returns:
        [Content] ascending, and [(start, end)] of the control tokens that are only text. The contents are None if
        `exact` is set and the places cannot be found.
    Raises:
        UserError: A text has a control token, and its place in the rendering cannot be found.
    """
    control = next(controls(conversation, vocabulary), None)
    if not control and not exact:
        contents = _by_search(conversation, text, spans)
        if contents is not None:
            return _ascending(contents + _schemas(conversation, text)), []
    found = _by_marks(conversation, text, vocabulary)
    if found is None and control:
        raise UserError(
            f"{control[0]} has {control[1]!r}, a control token of the tokenizer, and the template changes the text, "
            "so its place cannot be found; remove the token from the row"
        )
    if found is None:
        return (None if exact else _ascending(_schemas(conversation, text))), []
    contents, neutral = found
    return _ascending(contents + _schemas(conversation, text)), neutral


def _ascending(contents: list[Content]) -> list[Content]:
    return sorted(contents, key=lambda content: (content.start, content.end))


# ───── one occurrence ─────


def _by_search(conversation: Conversation, text: str, spans: list[Span]) -> list[Content] | None:
    """[Content]; None if a text does not occur exactly once in the range where it can be."""
    contents, position, behind = [], 0, list(spans)
    for i, message in enumerate(conversation.messages):
        if message.get("role") == "assistant":
            while behind and behind[0].message <= i:
                position = behind.pop(0).end
            continue
        content = _only_content(conversation, text, _own_message(i, message), position, behind)
        if content is None:
            return None
        position = content.end
        contents.append(content)
    for own in _own_variables(conversation):
        content = _only_content(conversation, text, own, 0, [])
        if content is None:
            return None
        contents.append(content)
    return contents


def _only_content(conversation: Conversation, text: str, own: _Own, start: int, behind: list[Span]) -> Content | None:
    """The Content of a text between `start` and the next reply; None if finding it needs marks."""
    number = _shown.get(_edges(conversation, own), 0 if len(own.ranges) == 1 or not own.text else None)
    if number is None or (own.text and own.ranges[number] is None):
        return None
    a, b = own.ranges[number] or (0, 0)
    core_a, core_b = own.ranges[-1] or (a, b)
    end = behind[0].start if behind else len(text)
    place = _only_place(text, own.text[core_a:core_b], start + core_a - a, end)
    if place is None or not text.startswith(own.text[a:b], place - core_a + a):
        return None
    place += a - core_a
    return Content(place, place + b - a, own.fate, own.key if isinstance(own.key, int) else None)


def _edges(conversation: Conversation, own: _Own) -> tuple[str, bool, tuple]:
    return conversation.template, own.key == 0, own.group


def _only_place(text: str, part: str, start: int, end: int) -> int | None:
    place = text.find(part, start, end)
    return None if place < 0 or (part and text.find(part, place + 1, end) >= 0) else place


def _schemas(conversation: Conversation, text: str) -> list[Content]:
    """Contents of the tools that are objects, as the tojson filter writes them."""
    given = [conversation.tools, conversation.variables.get("xml_tools"), conversation.variables.get("python_tools")]
    contents = []
    for tool in (tool for tools in given if isinstance(tools, list) for tool in tools if isinstance(tool, dict)):
        for indent in (None, 4):
            written = json.dumps(tool, ensure_ascii=False, indent=indent)
            start = _only_place(text, written, 0, len(text))
            if start is not None:
                contents.append(Content(start, start + len(written), Fate.SYSTEM, None))
                break
    return contents


# ───── the row's own texts ─────


def _own_message(i: int, message: Message) -> _Own:
    return _own(i, text_of(message.get("content")), fate_of(message.get("role")))


def _own_variables(conversation: Conversation) -> Iterator[_Own]:
    for name in ("custom_instructions", "xml_tools", "python_tools"):
        value = conversation.variables.get(name)
        for i, entry in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(entry, str) and entry:
                yield _own((name, i if isinstance(value, list) else None), entry, Fate.SYSTEM)


def _own(key: _Key, text: str, fate: Fate) -> _Own:
    """An _Own with its possible ranges: the complete text, trimmed, within its own tags, without flags at its edges."""
    if text and "/" not in text and not text[0].isspace() and not text[-1].isspace():
        return _Own(key, text, fate, [(0, len(text))], (fate,))
    trimmed = _trimmed(text, 0, len(text))
    ranges = [(0, len(text)), trimmed, _within_tags(text, *trimmed), _within_flags(text, *trimmed)]
    left = [span for span in dict.fromkeys(ranges) if span[0] < span[1] and not text[slice(*span)].isspace()]
    if len(left) < len(set(ranges)) or not left:
        left = [*dict.fromkeys([(0, len(text)), *left] if text else []), None]
    start, end = left[-1] or (0, 0)
    return _Own(key, text, fate, left, (fate, len(left), text[:start], text[end:]))


def _trimmed(text: str, start: int, end: int) -> _Range:
    inner = text[start:end]
    return start + len(inner) - len(inner.lstrip()), max(start, end - len(inner) + len(inner.rstrip()))


def _within_tags(text: str, start: int, end: int) -> _Range:
    start += len(_OPEN) if text.startswith(_OPEN, start, end) else 0
    return start, end - len(_CLOSE) if text.endswith(_CLOSE, start, end) else end


def _within_flags(text: str, start: int, end: int) -> _Range:
    while start < end and (flag := _FLAG.match(text, start, end)):
        start = _trimmed(text, flag.end(), end)[0]
    while start < end:
        last = text[start:end].split()[-1]
        if not _FLAG.fullmatch(last):
            break
        end = _trimmed(text, start, end - len(last))[1]
    return start, end


# ───── marks ─────


def _by_marks(conversation: Conversation, text: str, vocabulary: Vocabulary) -> _Found | None:
    """([Content], [(start, end)]); None if every way to mark the texts changes the rendering."""
    free = [mark for mark in _MARKS if mark not in text]
    if len(free) < len(_Marker.KINDS):
        return None
    own = [_own_message(i, m) for i, m in enumerate(conversation.messages) if m.get("role") != "assistant"]
    own += _own_variables(conversation)
    # A template may show once what is given as system message and as variable: then both get the same mark.
    for one_mark in (False, True):
        found = _widest(_Marker(conversation, text, vocabulary, own, free, one_mark))
        if found is not None:
            return found
    return None


def _widest(marker: "_Marker") -> _Found | None:
    """The result with the widest ranges that leave the rendering unchanged, one range for texts with the same edges."""
    groups = {each.group: len(each.ranges) - 1 for each in marker.own}
    found = marker.try_ranges(dict.fromkeys(groups, 0))
    if found is not None:
        _remember(marker, dict.fromkeys(groups, 0))
    if found is not None or not any(groups.values()):
        return found
    chosen, found = dict(groups), marker.try_ranges(groups)
    if found is None:
        return None
    for group, narrowest in groups.items():
        for width in range(narrowest):
            wider = marker.try_ranges({**chosen, group: width})
            if wider is not None:
                chosen, found = {**chosen, group: width}, wider
                break
    _remember(marker, chosen)
    return found


def _remember(marker: "_Marker", chosen: dict[tuple, int]) -> None:
    for own in marker.own:
        if len(own.ranges) > 1 and len(_shown) < _MAX_SHOWN:
            _shown[_edges(marker.conversation, own)] = chosen[own.group]


class _Marker:
    """Renders a conversation with marks and reads the places of the marks."""

    KINDS = (Fate.SYSTEM, Fate.USER, Fate.TOOL, "variable", "end", "control")

    def __init__(
        self,
        conversation: Conversation,
        text: str,
        vocabulary: Vocabulary,
        own: list[_Own],
        free: list[str],
        one_mark: bool,
    ):
        self.conversation, self.text, self.vocabulary, self.own = conversation, text, vocabulary, own
        self.marks = dict(zip(self.KINDS, free, strict=False))
        if one_mark:
            self.marks["variable"] = self.marks[Fate.SYSTEM]

    def try_ranges(self, widths: dict[tuple, int]) -> _Found | None:
        """The contents, with range number widths[group] of each text marked; None if the rendering changes."""
        chosen = [
            (own, own.ranges[min(widths[own.group], len(own.ranges) - 1)] if own.ranges else None) for own in self.own
        ]
        try:
            marked = self._marked(chosen).text()
        except UserError:
            return None
        places = []
        kinds = {mark: kind for kind, mark in self.marks.items()}
        pattern = re.compile("[" + "".join(kinds) + "]")
        plain = pattern.sub("", marked)
        if plain != self.text:
            return None
        for num, match in enumerate(pattern.finditer(marked)):
            places.append((kinds[match[0]], match.start() - num))
        return self._read(places, [own for own, span in chosen if span])

    def _read(self, places: list[tuple[Fate | str, int]], marked: list[_Own]) -> _Found:
        contents, neutral, opened = [], set(), None
        waiting = {kind: [own.key for own in marked if self._kind(own) == kind] for kind in self.KINDS[:4]}
        complete = {kind: sum(k == kind for k, _ in places) == len(keys) for kind, keys in waiting.items()}
        for kind, place in places:
            if kind == "control":
                match = self.vocabulary.added.match(self.text, place - 1)
                neutral |= {match.span()} if match else set()
            elif kind != "end":
                key = waiting[kind].pop(0) if complete[kind] and kind != "variable" else None
                opened = place, Fate.SYSTEM if kind == "variable" else kind, key
            elif opened:
                contents.append(Content(opened[0], place, *opened[1:]))
                opened = None
        for content in contents:
            matcher = self._matcher(content.fate)
            neutral |= {match.span() for match in matcher.finditer(self.text, content.start, content.end)}
        return contents, sorted(neutral)

    def _kind(self, own: _Own) -> Fate | str:
        return own.fate if isinstance(own.key, int) else "variable"

    def _matcher(self, fate: Fate) -> re.Pattern[str]:
        return self.vocabulary.added if fate in (Fate.USER, Fate.TOOL) else self.vocabulary.special

    def _marked(self, chosen: list[tuple[_Own, _Range | None]]) -> Conversation:
        ranges = {own.key: (own, span) for own, span in chosen}
        messages = [
            self._marked_reply(i, m)
            if m.get("role") == "assistant"
            else self._marked_message(m, *ranges.get(i, (None, None)))
            for i, m in enumerate(self.conversation.messages)
        ]
        variables = {}
        for name, value in self.conversation.variables.items():
            if isinstance(value, list):
                variables[name] = [self._marked_variable(v, ranges.get((name, i))) for i, v in enumerate(value)]
            else:
                variables[name] = self._marked_variable(value, ranges.get((name, None)))
        tools = self._marked_controls(self.conversation.tools, self.vocabulary.special)
        return replace(self.conversation, messages=messages, variables=variables, tools=tools)

    def _marked_message(self, message: Message, own: _Own, span: _Range | None) -> Message:
        matcher = self._matcher(own.fate)
        fixed = {"role": message.get("role"), "content": message.get("content")}
        rest = {key: value for key, value in message.items() if key not in fixed}
        marked = {**{key: fixed[key] for key in fixed if key in message}, **self._marked_controls(rest, matcher)}
        if span:
            marked["content"] = self._marked_content(message["content"], own, span)
        return marked

    def _marked_reply(self, i: int, message: Message) -> Message:
        """A reply with a mark in each control token that is only text."""
        words = reply_words(self.conversation, i, self.vocabulary)
        marks = [(start + 1, self.marks["control"]) for start, _ in words]
        marked = {}
        for key, value in message.items():
            if key == "content" and marks:
                marked[key] = _marked_parts(value, marks)
            else:
                as_is = key in ("role", "content")
                marked[key] = value if as_is else self._marked_controls(value, self.vocabulary.added)
        return marked

    def _marked_variable(self, value: Any, range_of: tuple[_Own, _Range | None] | None) -> Any:
        own, span = range_of or (None, None)
        return self._marked_content(value, own, span) if span else self._marked_controls(value, self.vocabulary.special)

    def _marked_content(self, content: Any, own: _Own, span: _Range) -> Any:
        """A content, string or list of parts, with a mark at both ends of the span and in each control token in it."""
        start, end = span
        inside = [match.start() + 1 for match in self._matcher(own.fate).finditer(own.text, start, end)]
        marks = [
            (start, self.marks[self._kind(own)]),
            *((i, self.marks["control"]) for i in inside),
            (end, self.marks["end"]),
        ]
        return _marked_parts(content, marks)

    def _marked_controls(self, value: Any, matcher: re.Pattern[str]) -> Any:
        """A value with a mark in each control token of all its strings."""
        if isinstance(value, str):
            return matcher.sub(lambda match: match[0][0] + self.marks["control"] + match[0][1:], value)
        if isinstance(value, dict):
            return {self._marked_controls(k, matcher): self._marked_controls(v, matcher) for k, v in value.items()}
        return [self._marked_controls(v, matcher) for v in value] if isinstance(value, list | tuple) else value


def _marked_parts(content: Any, marks: list[tuple[int, str]]) -> Any:
    """A content, string or list of parts, with marks inserted; marks are [(place in its text, mark)]."""
    if isinstance(content, str):
        return _with_marks(content, marks, 0, last=True)
    parts, done = [], 0
    last = max((i for i, part in enumerate(content) if part_text(part)), default=None)
    for i, part in enumerate(content):
        text = part_text(part)
        if text:
            new = _with_marks(text, marks, done, last=i == last)
            part = {**part, "text": new} if isinstance(part, dict) else new
        done += len(text)
        parts.append(part)
    return parts


def _with_marks(text: str, marks: list[tuple[int, str]], offset: int, last: bool) -> str:
    """The text with the marks that belong into it.

    Args:
        marks: [(place in the content, mark)], ascending by place.
        offset: Place of the text's first character in the content.
        last: Whether marks at the end of the text belong to it.
    """
    pieces, done, end = [], 0, offset + len(text) + last
    for place, mark in marks[bisect_left(marks, (offset,)) : bisect_left(marks, (end,))]:
        pieces += [text[done : place - offset], mark]
        done = place - offset
    return "".join([*pieces, text[done:]])
