"""The form of a reply: how it ended, where it thinks, how long it is."""

from typing import Any

from smolpost.chat.reasoning import split_reasoning
from smolpost.data.tools import check_arguments
from smolpost.errors import UserError
from smolpost.synthesis.records import Reply, Verdict
from smolpost.synthesis.replies import canonical

#: finish_reason of OpenAI's chat API -> name of the fault. The others are `stop` and `tool_calls`.
FINISH_FAULTS = {"length": "cut", "content_filter": "content_filter"}
BYTES_PER_TOKEN = 4  # of UTF-8, roughly, for servers that do not count

PASSED = Verdict(True)


def finished(reply: Reply) -> Verdict:
    """The reply ended by itself.

    Faults: "cut" at max_new_tokens, "content_filter", "refused" (the server gave a refusal instead of a reply),
    "unfinished" for a finish_reason that OpenAI's API does not have.
    """
    if isinstance(reply.raw, dict) and reply.raw.get("refusal"):
        return Verdict(False, "refused")
    if reply.finish_reason in ("stop", "tool_calls"):
        return PASSED
    return Verdict(False, FINISH_FAULTS.get(reply.finish_reason, "unfinished"))


def not_empty(reply: Reply) -> Verdict:
    """The reply has an answer or calls a tool; "empty" otherwise."""
    return PASSED if (reply.content or "").strip() or reply.tool_calls else Verdict(False, "empty")


def readable_calls(reply: Reply, tools: list[dict[str, Any]] | None) -> Verdict:
    """Training can read each call of the reply: "malformed_call", or "unknown_function" for one that is not listed.

    Args:
        tools: JSON schemas of functions that the teacher was given, or None.
    """
    listed = {(tool.get("function") or tool).get("name") for tool in tools or ()}
    for call in reply.tool_calls or ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return Verdict(False, "malformed_call")
        try:
            check_arguments(function, "", tools)
        except UserError:
            return Verdict(False, "malformed_call")
        if listed and function["name"] not in listed:
            return Verdict(False, "unknown_function")
    return PASSED


def think_format(reply: Reply, asked_to_think: bool | None) -> Verdict:
    """The reply thinks as it was asked to, and training reads its parts as the server gave them.

    Faults: "unclosed_thinking", "no_thinking" where it was asked for, "unasked_thinking", and "think_tags" where tags
    in the texts would move the border between reasoning and answer.

    Args:
        asked_to_think: None: as the teacher's template decides, so both are right. An empty block does not think.
    """
    reasoning, content = (reply.reasoning or "").strip("\r\n"), (reply.content or "").lstrip("\r\n")
    thinks = bool(reasoning.strip())
    if not reply.closed:
        return Verdict(False, "unclosed_thinking")
    if asked_to_think and not thinks:
        return Verdict(False, "no_thinking")
    if asked_to_think is False and thinks:
        return Verdict(False, "unasked_thinking")
    read = split_reasoning(canonical(reply) or "")
    return PASSED if read == (reasoning if thinks else None, content) else Verdict(False, "think_tags")


def length(reply: Reply, min_tokens: int | None, max_tokens: int | None) -> Verdict:
    """The reply has min_tokens to max_tokens tokens, both included: "too_short", "too_long". Score: `tokens_of`."""
    tokens = tokens_of(reply)
    fault = "too_short" if tokens < (min_tokens or 0) else "too_long" if max_tokens and tokens > max_tokens else ""
    return Verdict(not fault, fault, tokens)


def tokens_of(reply: Reply) -> int:
    """The teacher's tokens, reasoning included, as the server counted them, else a quarter of the UTF-8 bytes."""
    if reply.completion_tokens is not None:
        return reply.completion_tokens
    texts = (reply.reasoning or "", reply.content or "")
    return -(-sum(len(text.encode("utf-8", "replace")) for text in texts) // BYTES_PER_TOKEN)


def check_lengths(min_tokens: int | None, max_tokens: int | None, key: str) -> None:
    """
    Raises:
        UserError: No reply can have both.
    """
    if min_tokens and max_tokens and min_tokens > max_tokens:
        raise UserError(
            f"{key}.min_tokens={min_tokens} is above max_tokens={max_tokens}, so no reply would pass; lower min_tokens "
            "or raise max_tokens"
        )
