"""Rows as prompts: each under an id of its own, with the turns that a teacher has to answer."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from smolpost.data.prompts import split_last_reply, stated_mode
from smolpost.data.validate import turns_of_prompt
from smolpost.files import digest
from smolpost.synthesis.records import Message, Prompt

_MODE_WORDS = re.compile(r"(?<!\S)/(?:no_)?think(?!\S) ?")


def prompts_of(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Prompt]:
    """The rows in their order.

    A row's own `id` names it if it is a text or a number. Otherwise its source and its content do, so that its id stays
    when other rows come or go; equal rows are numbered from the second on.

    Args:
        rows: (name in the mixture, row). A row's own `source` goes before that name.
    """
    seen: Counter[str] = Counter()
    for name, row in rows:
        source = str(row.get("source") or name)
        given = row.get("id")
        if isinstance(given, str | int) and not isinstance(given, bool) and given != "":
            yield Prompt(str(given), source, dict(row))
            continue
        own = f"{source}-{digest(row)}"
        seen[own] += 1
        yield Prompt(own if seen[own] == 1 else f"{own}-{seen[own]}", source, dict(row))


def numbered(prompt: Prompt, number: int) -> list[Prompt]:
    """The prompt itself, or one for each of several rows that it becomes, with ids ID-1, ID-2, ..."""
    return [prompt] if number == 1 else [prompt._replace(id=f"{prompt.id}-{i}") for i in range(1, number + 1)]


def conversation_of(row: dict[str, Any]) -> list[Message]:
    """All turns of a conversation, of the chosen side of a pair or of a prompt, without words that set the think mode.

    The job sets the mode, and /think or /no_think in a system message would override it in the smollm3 template.
    """
    messages = row.get("messages") or row.get("chosen") or turns_of_prompt(row["prompt"])
    first = messages[0]
    if first["role"] != "system" or not isinstance(first.get("content"), str):
        return messages
    text = without_mode_words(first["content"])
    return [{**first, "content": text}, *messages[1:]] if text else messages[1:]


def without_mode_words(text: str) -> str:
    """The text without the words /think and /no_think."""
    return _MODE_WORDS.sub("", text).strip()


def question_of(row: dict[str, Any]) -> list[Message]:
    """The turns before the last reply; all turns where the user speaks last."""
    messages = conversation_of(row)
    return messages if messages[-1]["role"] == "user" else split_last_reply(messages)[0]


def mode_of(row: dict[str, Any], asked: bool | None) -> bool | None:
    """Whether the teacher is to think: as asked, else as the row says; None where neither says."""
    if asked is not None:
        return asked
    if row.get("messages") or row.get("chosen"):
        return stated_mode(row)
    return (row.get("chat_template_kwargs") or {}).get("enable_thinking")


def has_tool_turns(row: dict[str, Any]) -> bool:
    """Whether a tool's result stands in the conversation."""
    return any(message["role"] == "tool" for message in conversation_of(row))


def asks_nothing(messages: list[Message]) -> bool:
    """Whether no user speaks in the turns that a teacher has to answer."""
    return not any(message["role"] == "user" for message in messages)
