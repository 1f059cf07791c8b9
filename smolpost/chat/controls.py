"""Control tokens that are written in a row's own texts: they must reach the model as text.

In texts of users and tools, every added token of the tokenizer is only text; in the system's texts, every special one.
In a reply, <think>, <tool_call> and the like are tokens where they are its structure, and text anywhere else.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from smolpost.chat.calls import ALL_TAGS, TAGS, call_blocks
from smolpost.chat.reasoning import CLOSE, OPEN, think_blocks
from smolpost.chat.render import RESULT_ROLES, Conversation, text_of

if TYPE_CHECKING:  # it imports this file
    from smolpost.chat.text_pieces import Vocabulary

_INSIDERS = ("system", "developer")
#: Tokens that are structure in a reply at the places of the format, and text anywhere else.
STRUCTURE = (OPEN, CLOSE, *(f"<{slash}{tag}>" for tag in (*ALL_TAGS, "tool_response") for slash in ("", "/")))


def controls(conversation: Conversation, vocabulary: "Vocabulary") -> Iterator[tuple[str, str]]:
    """The control tokens in a row's own texts, before rendering.

    Args:
        conversation: A `smolpost.chat.render.Conversation`.
        vocabulary: `smolpost.chat.text_pieces.Vocabulary`.
    Yields:
        (place, token): the name of a message or variable, and the first control token in each of its texts.
    """
    for i, message in enumerate(conversation.messages):
        is_reply = message.get("role") == "assistant"
        matcher = vocabulary.special if message.get("role") in _INSIDERS else vocabulary.added
        values = [value for key, value in message.items() if key != "role" and not (is_reply and key == "content")]
        if is_reply:
            text = text_of(message.get("content"))
            yield from ((f"messages[{i}]", text[start:end]) for start, end in reply_words(conversation, i, vocabulary))
        elif isinstance(message.get("content"), list | tuple):
            values.append(text_of(message["content"]))
        yield from ((f"messages[{i}]", found) for found in _matches(values, matcher))
    variables = {f"chat_template_kwargs.{name}": value for name, value in conversation.variables.items()}
    for place, value in {**variables, "tools": conversation.tools}.items():
        yield from ((place, found) for found in _matches(value, vocabulary.special))


def reply_words(conversation: Conversation, i: int, vocabulary: "Vocabulary") -> list[tuple[int, int]]:
    """[(start, end)] of the control tokens in the content of reply i that are only text.

    These are the STRUCTURE tokens outside its think blocks and calls, and all other special tokens.
    """
    text = text_of(conversation.messages[i].get("content"))
    found = [match.span() for match in vocabulary.added.finditer(text)]
    if not found:
        return []
    structure = _structure(text, _calls_code(conversation, i))
    words = [span for span in found if span not in structure]
    return [s for s in words if text[slice(*s)] in STRUCTURE or vocabulary.special.fullmatch(text, *s)]


def _structure(text: str, calls_code: bool) -> set[tuple[int, int]]:
    """(start, end) of every tag that is structure."""
    spans, answer = set(), 0
    for block in think_blocks(text):
        spans |= {(block.start, block.inner_start), (block.inner_end, block.end)}
        answer = block.end
    for block in call_blocks(text[answer:], ALL_TAGS if calls_code else (TAGS["xml"],)):
        spans |= {(answer + block.start, answer + block.inner_start), (answer + block.inner_end, answer + block.end)}
    return spans


def _calls_code(conversation: Conversation, i: int) -> bool:
    """Whether <code> is a call in reply i: the row has Python tools, or a tool answers. Otherwise it is HTML."""
    after = conversation.messages[i + 1].get("role") if i + 1 < len(conversation.messages) else None
    return bool(conversation.variables.get("python_tools")) or after in RESULT_ROLES


def _matches(value: Any, matcher: re.Pattern[str]) -> Iterator[str]:
    if isinstance(value, str):
        match = matcher.search(value)
        if match:
            yield match[0]
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _matches(key, matcher)
            yield from _matches(part, matcher)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _matches(part, matcher)
