"""Every rule that a row in our columns must keep."""

import re
from itertools import zip_longest

from smolpost.chat.calls import call_blocks
from smolpost.data.columns import ends_in_two_users
from smolpost.data.rows import kind_of
from smolpost.data.tools import check_arguments
from smolpost.data.turns import REASONING_PARTS, ROLES, TEXT_PARTS
from smolpost.errors import UserError

# How calls look in a reply's text in other templates' forms; `chat.calls` knows SmolTalk2's.
OTHER_CALLS = re.compile(r"(?m)^[ \t]*(<function|<\|python_tag\|>|\[TOOL_CALLS\])")


QUESTION_AND_ANSWER = (("query", "response"), ("question", "answer"), ("question", "response"), ("input", "output"))


def validate_row(row: dict, where: str, pairs: bool = False, replies: bool = True) -> str:
    """The row's shape: "preference", "messages", "text" or "prompt". A column that holds null counts as missing.

    Args:
        row: As `as_row` gives it. Preference rows hold `chosen` and `rejected`, two full conversations, and may hold
            `prompt`, a string or messages; rows with `messages` and `text` are conversations.
        where: File and row, for the message.
        pairs: What is checked of a row that has messages and a pair: the pair.
        replies: False: conversations need no reply, and `prompt` alone is enough, as the row is only to be answered.
    Raises:
        UserError: The row has no known shape, or breaks its shape's rules.
    """
    for key, kind in (("chat_template_kwargs", dict), ("tools", list)):
        if row.get(key) is not None and not isinstance(row[key], kind):
            expected = "an object" if kind is dict else "a list of JSON schemas"
            raise UserError(f"{where}: {key} is {kind_of(row[key])}; expected {expected} or null")
    for i, tool in enumerate(row.get("tools") or []):
        if not isinstance(tool, dict):
            raise UserError(f"{where}: tools[{i}] is {kind_of(tool)}; expected a JSON schema, an object with name")
    is_pair = row.get("chosen") is not None and row.get("rejected") is not None
    if is_pair and (pairs or row.get("messages") is None):
        _check_pair(row, where)
        return "preference"
    if row.get("messages") is not None:
        _check_messages(row["messages"], f"{where}: messages", row.get("tools"), replies)
        if replies:
            _check_reply(row["messages"], f"{where}: messages")
        return "messages"
    if not replies and row.get("prompt") is not None:
        _check_messages(turns_of_prompt(row["prompt"]), f"{where}: prompt", row.get("tools"), replies)
        return "prompt"
    if row.get("text") is not None:
        if not isinstance(row["text"], str) or not row["text"]:
            found = "empty" if row["text"] == "" else kind_of(row["text"])
            raise UserError(f"{where}: text is {found}; expected a string with content, or delete the row")
        return "text"
    found = ", ".join(key if value is not None else f"{key} (null)" for key, value in row.items()) or "none"
    raise UserError(
        f"{where}: has the columns {found}; expected messages, or chosen and rejected, or text; {_hint(row)}"
    )


def turns_of_prompt(prompt) -> list:
    """The turns of a column that holds a text or messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _hint(row: dict) -> str:
    """What to do about a row of no known shape."""
    if row.get("conversations") is not None:
        return "they look like ShareGPT; set columns: sharegpt"
    if row.get("instruction") is not None:
        return "they look like Alpaca; set columns: alpaca"
    if isinstance(row.get("question"), str) and "\n#### " in str(row.get("answer")):
        return "they look like GSM8K; set columns: gsm8k"
    for asked, answered in QUESTION_AND_ANSWER:
        if isinstance(row.get(asked), str) and isinstance(row.get(answered), str):
            return (
                f"a question and its answer load with columns: alpaca and rename {{{asked}: instruction, {answered}: "
                "output}"
            )
    if row.get("question") is not None and row.get("function") is not None:
        return (
            "they are Berkeley function-calling prompts, made for evaluation, without a reply to train on; write rows "
            "with messages (the turns of question, then an assistant turn with tool_calls) and rename {function: tools}"
        )
    return "rename the columns"


def _check_pair(row: dict, where: str) -> None:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is not None and not isinstance(prompt, str | list):
        raise UserError(f"{where}: prompt is {kind_of(prompt)}; expected a string or a list of messages")
    for key in ("chosen", "rejected"):
        _check_messages(row[key], f"{where}: {key}", row.get("tools"))
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are equal; expected two different replies; delete the row")
    if chosen[0] != rejected[0] or min(len(chosen), len(rejected)) < 2:
        raise UserError(
            f"{where}: chosen and rejected do not share a prompt; expected two "
            "full conversations that begin with the same "
            "messages; put the prompt's messages before both replies"
        )
    shared = next(i for i, pair in enumerate(zip_longest(chosen, rejected)) if pair[0] != pair[1])
    for key in ("chosen", "rejected"):
        if not any(message["role"] == "assistant" for message in row[key][shared:]):
            raise UserError(f"{where}: {key} has no assistant turn after the shared prompt; there is nothing to prefer")
        _check_reply(row[key], f"{where}: {key}")


def _check_messages(messages, where: str, tools: list | None = None, replies: bool = True) -> None:
    if not isinstance(messages, list) or not messages:
        found = "empty" if messages == [] else kind_of(messages)
        raise UserError(f"{where} is {found}; expected a list of messages, each with role and content")
    was_called = False
    for i, message in enumerate(messages):
        _check_message(message, f"{where}[{i}]", tools)
        role = message["role"]
        if role == "system" and i:
            found = "a second system turn" if messages[0]["role"] == "system" else "a system turn after other turns"
            raise UserError(
                f"{where}[{i}] is {found}; expected one at most, at the start; "
                "join its text to the first turn's, or make it a user turn"
            )
        was_called = was_called or (role == "tool" and any(map(_is_call, messages[:i])))
        if role == "tool" and not was_called:
            raise UserError(
                f"{where}[{i}] is a tool turn without an assistant's call before it; expected tool_calls in an "
                "earlier assistant turn, or <tool_call> or <code> in its text; add the call or delete the row"
            )
    if ends_in_two_users(messages):
        raise UserError(
            f"{where} ends in two user turns; the last one looks like a reply that is labelled user; "
            "set the source's last_user_is_reply: true if it is a reply, or delete the row"
        )
    if replies and not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where} has no assistant turn; expected at least one to train on; delete the row")


def _check_reply(messages: list[dict], where: str) -> None:
    """Refuse a conversation without a reply to a user: it is a text, or its prompt is missing.

    Both templates would render it. A conversation that the assistant opens is allowed.
    """
    roles = [message["role"] for message in messages]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        raise UserError(
            f"{where} has no assistant turn after a user turn; expected a reply to a user; "
            "add the user's turn, or put the words into a text column"
        )


def _check_message(message, where: str, tools: list | None = None) -> None:
    if not isinstance(message, dict):
        raise UserError(f"{where} is {kind_of(message)}; expected an object with role and content")
    role = message.get("role")
    if role is None:
        other = "; set columns: sharegpt" if "from" in message and "value" in message else ""
        found = ", ".join(message) or "nothing"
        raise UserError(f"{where} has no role, only {found}; expected role and content{other}")
    if role not in ROLES:
        raise UserError(
            f"{where}.role is {role!r:.80}; expected one of {', '.join(ROLES)}; say what it stands for with the "
            f"source's roles, as roles: {{{role}: user}}"
        )
    _check_calls(message, where, tools)
    text = message_text(message, where)
    if role == "assistant" and (message.get("tool_calls") or message.get("reasoning_content")):
        return
    if message.get("content") is None:
        raise UserError(f"{where} has no content; expected a string (null only in an assistant turn with tool_calls)")
    if role in ("user", "assistant") and not text.strip():
        calls = " or tool_calls" if role == "assistant" else ""
        raise UserError(f"{where} is an empty {role} turn; expected content{calls}; fill it or delete the row")


def message_text(message: dict, where: str) -> str:
    """The content's text; "" if it is missing. A list may have strings and objects with text."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise UserError(f"{where}.content is {kind_of(content)}; expected a string or a list of text parts")
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    for i, (part, text) in enumerate(zip(content, texts, strict=True)):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise UserError(
                f"{where}.content[{i}]={part!r:.80} is not a text part; only text can be trained on (types "
                f"{', '.join((*TEXT_PARTS, *REASONING_PARTS))}); delete the row"
            )
    return "".join(texts)


def _is_call(message: dict) -> bool:
    if message["role"] != "assistant":
        return False
    text = message_text(message, "")
    return bool(message.get("tool_calls") or call_blocks(text) or OTHER_CALLS.search(text))


def _check_calls(message: dict, where: str, tools: list | None) -> None:
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise UserError(f"{where}.tool_calls is {kind_of(calls)}; expected a list of calls")
    for i, call in enumerate(calls or ()):
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}.tool_calls[{i}] names no function; expected an object with name and arguments")
        check_arguments(function, f"{where}.tool_calls[{i}]", tools)
