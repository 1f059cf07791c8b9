"""The calls of a reply, in words that a user reads before typing their results."""

import json
from typing import Any

from smolpost.chat.calls import TAGS, call_blocks
from smolpost.talk.conversation import STOP, Said, Tools

Awaited = tuple[str, str | None]  # a call in words, and its id


def calls_of(said: Said, tools: Tools) -> list[Awaited]:
    """The calls whose results the model waits for; none in a reply that was cut, or where it was given no tools."""
    if said.finish != STOP:
        return []
    if structured := said.message.get("tool_calls"):
        return [(_words(call["function"]), call.get("id")) for call in structured]
    tags = [TAGS["xml"]] if tools.schemas or tools.xml else []
    tags += [TAGS["python"]] if tools.python else []
    found: list[Awaited] = []
    for block in call_blocks(said.answer, tags):
        inner = said.answer[block.inner_start : block.inner_end].strip()
        found += [(words, None) for words in ([inner] if block.tag == TAGS["python"] else _from_json(inner))]
    return found


def _from_json(text: str) -> list[str]:
    """One call or a list of them; the text itself where it is not one."""
    try:
        content = json.loads(text)
    except ValueError:
        return [text]
    calls = content if isinstance(content, list) else [content]
    return [_words(call) if isinstance(call, dict) and "name" in call else json.dumps(call) for call in calls]


def _words(function: dict[str, Any]) -> str:
    """name(argument=value, ...)."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            return f"{function['name']}({arguments})"
    if not isinstance(arguments, dict):
        return f"{function['name']}({'' if arguments is None else arguments})"
    inside = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
    return f"{function['name']}({inside})"
