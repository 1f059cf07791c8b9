"""Finds the replies in a rendered conversation, in two independent ways.

The first way uses the template's {% generation %} tags. The second way uses differences of renderings: a reply is what
the rendering adds to the generation prompt of the messages before it. It does not need tags, so it works with any
model's own template. If there are tags, each way checks the other.
"""

from dataclasses import replace
from typing import NamedTuple

from smolpost.chat.render import Conversation, Message
from smolpost.errors import UserError


class EndlessTurn(UserError):
    """A turn that trains ends without a stop token, so a model could not learn to stop."""


class Span(NamedTuple):
    """A reply in the text.

    Attributes:
        start: First character after the generation prompt.
        end: Position after the stop token.
        message: Index of the assistant message; None if the template does not mark one span for each message.
    """

    start: int
    end: int
    message: int | None


def generation_spans(
    conversation: Conversation, text: str, spans: list[tuple[int, int]], stops: list[str]
) -> list[Span]:
    """The template's own spans as [Span], ascending.

    Tags often enclose the line breaks beside a reply too. These belong to the header, or come after the stop token.

    Args:
        text, spans: The result of the conversation's `render`.
        stops: Texts of the tokens that may end a reply.
    """
    replies = assistant_turns(conversation.messages)
    if len(replies) != len(spans):
        return [Span(start, end, None) for start, end in spans]
    found = [Span(start, end, i) for (start, end), i in zip(spans, replies, strict=True)]
    return [_without_line_breaks(conversation, text, span, stops) for span in found]


def _without_line_breaks(conversation: Conversation, text: str, span: Span, stops: list[str]) -> Span:
    inner = text[span.start : span.end]
    end = span.start + len(inner.rstrip())
    if end < span.end and text.endswith(tuple(stops), 0, end):
        span = span._replace(end=end)
    if not inner[:1].isspace():
        return span
    try:
        start, end = _reply(conversation, text, span.message, stops)
    except UserError:  # the template rewrites earlier turns
        return span
    told = Span(start, end, span.message)
    return span if differ(text, told, span) else told


def differ(text: str, one: Span, other: Span) -> bool:
    """Whether two spans of a reply differ by more than white space."""
    edges = ((one.start, other.start), (one.end, other.end))
    return any(text[min(pair) : max(pair)].strip() for pair in edges)


def prefix_spans(conversation: Conversation, text: str, stops: list[str]) -> tuple[list[Span], dict[int, UserError]]:
    """The replies by differences of renderings.

    Args:
        text: The conversation's rendering.
        stops: Texts of the tokens that may end a reply.
    Returns:
        [Span] ascending, and {message: UserError} for replies whose span cannot be found.
    """
    spans, unknown = [], {}
    for i in assistant_turns(conversation.messages):
        try:
            start, end = _reply(conversation, text, i, stops)
        except UserError as error:
            unknown[i] = error
        else:
            spans.append(Span(start, end, i))
    return spans, unknown


def turn_end(conversation: Conversation, text: str, i: int, stops: list[str]) -> int:
    """Position after the stop token of message i.

    Raises:
        UserError: The text does not begin with the rendering up to message i.
        EndlessTurn: The turn ends without a stop token.
    """
    turn = replace(conversation, messages=conversation.messages[: i + 1], add_generation_prompt=False).text()
    check_prefix(text, turn)
    end = len(turn.rstrip("\n"))
    if not text.endswith(tuple(stops), 0, end):
        raise _endless(text, end, i, stops)
    return end


def check_stop(text: str, span: Span, stops: list[str]) -> None:
    """Refuse a reply without a stop token at its end. A stop token right after the span is accepted.

    Raises:
        EndlessTurn: Names what the reply ends with.
    """
    if not text.endswith(tuple(stops), span.start, span.end) and not text[span.end :].lstrip().startswith(tuple(stops)):
        raise _endless(text, span.end, span.message, stops)


def _endless(text: str, end: int, i: int | None, stops: list[str]) -> EndlessTurn:
    return EndlessTurn(
        f"messages[{i}]: the chat template ends the turn with {text[max(0, end - 12) : end]!r}, which is not a stop "
        "token of the tokenizer, so a model could not learn to stop; use a template that ends turns with one of its "
        f"control tokens ({', '.join(stops[:4]) or 'it has none: add one to the checkpoint'})"
    )


def assistant_turns(messages: list[Message]) -> list[int]:
    """Indices of the assistant messages."""
    return [i for i, message in enumerate(messages) if message.get("role") == "assistant"]


def check_prefix(text: str, prefix: str) -> None:
    """Refuse a template whose renderings do not extend each other.

    Raises:
        UserError: The text does not begin with the prefix.
    """
    if not text.startswith(prefix):
        raise UserError(
            "the chat template renders earlier turns differently when later turns follow; use a template that does "
            "not, such as smollm3, or train the last turn only (the stage's last_turn_only=true)"
        )


def _reply(conversation: Conversation, text: str, i: int, stops: list[str]) -> tuple[int, int]:
    before = replace(conversation, messages=conversation.messages[:i], add_generation_prompt=True).text()
    if i == len(conversation.messages) - 1 and not text.startswith(before):
        raise _unlike_prompt(conversation, text, i, before)
    check_prefix(text, before)
    end = turn_end(conversation, text, i, stops)
    if end < len(before):
        raise UserError(f"messages[{i}]: the chat template's generation prompt is longer than the turn it begins")
    return len(before), end


def _unlike_prompt(conversation: Conversation, text: str, i: int, before: str) -> UserError:
    """The error for a last reply whose prompt is not what the rendering begins with.

    Args:
        before: The prompt.
    """
    history = replace(conversation, messages=conversation.messages[:i]).text()
    if not text.startswith(history):
        return UserError(
            f"the chat template renders the turns before messages[{i}] differently when it follows; use a template "
            "that does not, such as smollm3"
        )
    return UserError(
        f"messages[{i}]: the chat template asks for this reply with {before[len(history) :]!r} and then writes "
        f"{text[len(history) :][:40]!r}; correct the row's enable_thinking or think block, or use another template"
    )
