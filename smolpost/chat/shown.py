"""Finds what a rendering leaves out of its conversation.

A template may drop what it does not know, such as calls, reasoning or the system message. The user must be told.
Replies are compared up to white space, because templates add line breaks. Other texts may be written as JSON, so only
their longest words are searched for.
"""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from smolpost.chat.reasoning import think_blocks
from smolpost.chat.render import RESULT_ROLES, Conversation, Message, render, text_of
from smolpost.chat.spans import Span, assistant_turns
from smolpost.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FLAG = re.compile(r"(?<!\S)/\w+(?!\S)")  # such as /no_think, which the template reads
_BREAKS = re.compile(r'[\s"\\]+')  # what JSON writes differently
_NUM_WORDS = 3
_QUESTION = [{"role": "user", "content": "?"}]


class Omission(NamedTuple):
    """Something that is in a conversation and not in its rendering.

    Attributes:
        kind: In a reply that trains: "call", "text", "text beside calls", "reasoning" (in the last reply), "earlier
            reasoning" (in another one), or "all" if only the stop token is left. In the conversation: "system",
            "user", "tool results" or "tools".
        message: Index of the reply, or of the first message of that kind; None for tools.
        what: Its text, or the name of a call or tool.
    """

    kind: str
    message: int | None
    what: str


def omissions(
    conversation: Conversation, text: str, spans: list[Span], replies: list[int], stops: list[str]
) -> tuple[Omission, ...]:
    """What the rendering leaves out; for texts outside the replies, one Omission of each kind.

    Args:
        conversation: A `smolpost.chat.render.Conversation`.
        text: Its rendering.
        spans: [smolpost.chat.spans.Span] of its replies. For a reply without a span, the complete text is searched.
        replies: Indices of the replies that train. Without any, nothing is reported.
        stops: Tokens of which one ends each reply.
    """
    if not replies:
        return ()
    messages, found = conversation.messages, []
    shown = {span.message: text[span.start : span.end] for span in spans}
    last = assistant_turns(messages)[-1]
    for i in replies:
        reply = shown.get(i, text)
        lost = [Omission(kind, i, what) for kind, what in _of_reply(messages[i], reply, i == last)]
        found += [*lost, Omission("all", i, lost[-1].what)] if lost and reply.strip() in stops else lost
    return (*found, *_of_others(conversation, _between(text, spans)))


def _of_reply(message: Message, shown: str, is_last: bool) -> Iterator[tuple[str, str]]:
    """(kind, what) of each loss."""
    content = text_of(message.get("content"))
    blocks = think_blocks(content) if "think>" in content else []
    beside = message.get("reasoning_content") or message.get("reasoning")
    thoughts = [beside] if isinstance(beside, str) else [content[b.inner_start : b.inner_end] for b in blocks]
    answer = content[blocks[-1].end :] if blocks else content
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    lost_calls = [name for name, parts in map(_call, calls) if not all(part in shown for part in parts)]
    yield from (("call", name) for name in lost_calls[:1])
    if not _holds(shown, answer):
        yield "text beside calls" if calls and not lost_calls else "text", answer
    lost_thoughts = [thought for thought in thoughts if not _holds(shown, thought)]
    yield from (("reasoning" if is_last else "earlier reasoning", thought) for thought in lost_thoughts[:1])


def _call(call: dict[str, Any]) -> tuple[str, list[str]]:
    """A call's name, and what it contains in every format: the names of the function and of its arguments."""
    function = call.get("function") or call
    arguments = function.get("arguments")
    names = [function.get("name"), *(arguments if isinstance(arguments, dict) else ())]
    return str(names[0]), [name for name in names if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name, re.A)]


def _holds(shown: str, part: str) -> bool:
    part = part.strip()
    return part in shown or "".join(part.split()) in "".join(shown.split())


def _of_others(conversation: Conversation, text: str) -> Iterable[Omission]:
    kinds = {"system": "system", "user": "user", **dict.fromkeys(RESULT_ROLES, "tool results")}
    texts = [(kinds.get(m.get("role")), i, text_of(m.get("content"))) for i, m in enumerate(conversation.messages)]
    variables = conversation.variables
    texts.append(("system", 0, variables.get("custom_instructions")))
    for given in (conversation.tools, variables.get("xml_tools"), variables.get("python_tools")):
        tools = given if isinstance(given, list) else [given]
        texts += [("tools", None, (t.get("function") or t).get("name") if isinstance(t, dict) else t) for t in tools]
    lost = {}
    for kind, i, said in texts:
        if kind and kind not in lost and isinstance(said, str) and not _mentions(text, said):
            lost[kind] = Omission(kind, i, said)
    return lost.values()


def _mentions(text: str, said: str) -> bool:
    if said in text:
        return True
    words = {word for word in _BREAKS.split(_FLAG.sub(" ", said)) if word}
    return all(word in text for word in sorted(words, key=len)[-_NUM_WORDS:])


def _between(text: str, spans: list[Span]) -> str:
    """The text without the replies."""
    parts, done = [], 0
    for span in spans:
        parts.append(text[done : span.start])
        done = span.end
    return "".join([*parts, text[done:]])


class Modes(NamedTuple):
    """The think modes of a chat template, chosen by `enable_thinking`.

    Attributes:
        two: It has both; otherwise the variable changes nothing.
        thinks_unasked: It thinks if the variable is not given.
    """

    two: bool
    thinks_unasked: bool


def modes_of(tokenizer: "PreTrainedTokenizerBase", today: str) -> Modes | None:
    """None if the chat template refuses a question."""

    def prompt(**variables: bool) -> str:
        options = {"template_kwargs": variables, "today": today, "add_generation_prompt": True}
        return render(tokenizer, _QUESTION, **options)

    try:
        thinks, answers = prompt(enable_thinking=True), prompt(enable_thinking=False)
        return Modes(thinks != answers, prompt() == thinks != answers)
    except UserError:  # it reads variables that only rows have
        return None
