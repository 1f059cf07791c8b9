"""Messages as people write them, turned into ours: four roles, text, reasoning_content, tool_calls and train."""

from typing import Any

from smolpost.chat.python_calls import Malformed, python_calls
from smolpost.chat.reasoning import split_reasoning
from smolpost.data.keys import MARKS, MESSAGE, REFUSED_IN_MESSAGES, is_empty, mark_of, refuse
from smolpost.data.rows import parse_json, without_nulls
from smolpost.data.tools import own_calls
from smolpost.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
#: Other names of the roles: OpenAI's newer one, ShareGPT's, Gemma's, OLMo's, Llama's, ms-swift's.
ROLE_NAMES = {
    "developer": "system", "human": "user", "gpt": "assistant", "model": "assistant",
    "function": "tool", "observation": "tool", "environment": "tool", "ipython": "tool", "tool_response": "tool",
}  # fmt: skip
#: Roles of turns whose text is calls as JSON.
CALL_ROLES = ("function_call", "tool_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "thinking")
JSON_KEYS = ("tools", "functions", "tool_calls", "function_call")
#: Keys of a turn that are honoured or refused; any other is counted.
READ = {*MESSAGE, *REASONING, *MARKS, *JSON_KEYS, "function_calls", "refusal", *REFUSED_IN_MESSAGES}


def known_roles(roles: dict[str, str]) -> tuple[str, ...]:
    return (*ROLES, *ROLE_NAMES, *CALL_ROLES, *roles)


def own_turns(messages: list, where: str, roles: dict[str, str], unread: set[str]) -> tuple[list, list]:
    """The messages in our keys; anything else stays as it is, and `validate_row` refuses it.

    Args:
        roles: Role of the file -> one of ROLES, before ROLE_NAMES.
        unread: Gets the names of keys that are not read, as messages.KEY.
    Returns:
        The messages, and the tools given in single messages.
    Raises:
        UserError: A key that changes what the turn means cannot be followed.
    """
    turns, tools, was_call = [], [], False
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            turns.append(message)
            continue
        turn, given = own_turn(message, f"{where}[{i}]", roles, unread)
        tools += [value for value in given if value not in tools]
        is_call = roles.get(message.get("role"), message.get("role")) in CALL_ROLES
        if is_call and was_call:  # calls made at once come as turns of their own
            turns[-1] = {**turns[-1], "tool_calls": turns[-1]["tool_calls"] + turn["tool_calls"]}
        else:
            turns.append(turn)
        was_call = is_call
    return turns, tools


def own_turn(message: dict, where: str, roles: dict[str, str], unread: set[str]) -> tuple[dict, list]:
    if "role" not in message:
        return message, []
    message = {key: read_json(value, f"{where}.{key}") if key in JSON_KEYS else value for key, value in message.items()}
    refuse(message, REFUSED_IN_MESSAGES, where)
    role = message["role"]
    named = roles.get(role, role) if isinstance(role, str) else role
    known = ROLE_NAMES.get(named, named) if isinstance(named, str) else named
    turn: dict[str, Any] = {"role": "assistant" if named in CALL_ROLES else known}
    content, reasoning = _content(message, where)
    calls = _calls(message, where, unread)
    if named in CALL_ROLES:
        thought, content = split_reasoning(content) if isinstance(content, str) else (None, content)
        reasoning = reasoning or thought
        calls = called_in(content, f"{where}.content", unread)
        content = None
    if content is not None:
        turn["content"] = content
    if reasoning and not _is_in_content(reasoning, content, where):
        turn["reasoning_content"] = reasoning
    if calls is not None:
        turn["tool_calls"] = calls
    if (trains := mark_of(message, MARKS, where)) is not None:
        turn["train"] = trains
    turn |= {key: message[key] for key in ("name", "tool_call_id") if key in message}
    unread |= {f"messages.{key}" for key, value in message.items() if key not in READ and not is_empty(value)}
    return turn, [message[key] for key in ("tools", "functions") if not is_empty(message.get(key))]


def read_json(value, where: str):
    """What a text of JSON means, without nulls; another text or value as it is, None for an empty text."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    return without_nulls(parse_json(text, where)) if text[:1] in ("[", "{") else (value if text else None)


# ---------------------------------------------------------------- content and reasoning


def _content(message: dict, where: str) -> tuple[Any, str | None]:
    """The content's text, and the reasoning beside or in it."""
    content, reasoning = message.get("content"), None
    if isinstance(content, list):
        content, reasoning = _joined_parts(content, f"{where}.content")
    if not is_empty(message.get("refusal")):
        if not is_empty(content):
            raise UserError(f"{where}: has both content and refusal; keep the one that the assistant said")
        content = message["refusal"]
    given = {key: message[key] for key in REASONING if not is_empty(message.get(key))}
    if reasoning:
        given["content"] = reasoning
    for key, text in given.items():
        if not isinstance(text, str):
            raise UserError(f"{where}.{key} is {text!r:.60}; expected the reasoning as a text")
        inner, rest = split_reasoning(text)
        if inner is not None and not rest:  # written with its tags
            given[key] = inner
    if len({text.strip() for text in given.values()}) > 1:
        raise UserError(f"{where}: {' and '.join(given)} have different reasoning; keep one of them")
    return content, next(iter(given.values()), None)


def _joined_parts(parts: list, where: str) -> tuple[Any, str | None]:
    """(text, reasoning) of a list of parts; the list itself where a part is of a kind that `validate_row` refuses."""
    texts, reasoning = [], []
    for i, part in enumerate(parts):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind in REASONING_PARTS:
            text = next((part[key] for key in (kind, "text", "content") if isinstance(part.get(key), str)), None)
            if text is None or texts:
                found = "holds no text" if text is None else "comes after the answer's text"
                raise UserError(f"{where}[{i}] of type {kind} {found}; expected reasoning as text, before the answer")
            reasoning.append(text)
            continue
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            return parts, None
        texts.append(text)
    return "".join(texts), "\n".join(reasoning) or None


def _is_in_content(reasoning: str, content, where: str) -> bool:
    """Whether the content opens with the same reasoning."""
    inner = split_reasoning(content)[0] if isinstance(content, str) else None
    if inner and inner.strip() != reasoning.strip():
        raise UserError(f"{where}: has reasoning beside its content and another think block in it; keep one of them")
    return bool(inner)


# ---------------------------------------------------------------- calls


def _calls(message: dict, where: str, unread: set[str]) -> list | None:
    """The turn's calls in OpenAI's newer form; None without calls."""
    calls = message.get("tool_calls")
    given = {key for key in ("tool_calls", "function_call", "function_calls") if not is_empty(message.get(key))}
    if len(given) > 1:
        raise UserError(f"{where}: has {' and '.join(sorted(given))}; expected the calls in one of them")
    if "function_call" in given:
        calls = [message["function_call"]]
    elif "function_calls" in given:
        calls = _olmo_calls(message["function_calls"], f"{where}.function_calls")
    return own_calls(calls, f"{where}.tool_calls", unread) if not is_empty(calls) else None


def _olmo_calls(calls, where: str):
    """Calls as OLMo's rows write them, in Python, one a line."""
    if not isinstance(calls, str):
        return calls
    try:
        found = python_calls(calls)
    except Malformed as error:
        raise UserError(f"{where}={calls!r:.80} cannot be read ({error}); write the calls as tool_calls") from error
    if any(call.positional for call in found):
        raise UserError(f"{where}={calls!r:.80} has an argument without a name; write the calls as tool_calls")
    return [{"name": call.name, "arguments": call.arguments} for call in found]


def called_in(text, where: str, unread: set[str]) -> list:
    """The calls that a text of JSON holds, one or a list of them."""
    calls = parse_json(text, where) if isinstance(text, str) else text
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise UserError(f"{where} is {text!r:.80}; expected a call as JSON, with name and arguments")
    return own_calls(calls, where, unread)
