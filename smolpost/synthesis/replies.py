"""A server's message in one form, whatever it calls the reasoning and wherever it puts it.

| server | where the reasoning is |
|---|---|
| vLLM with a reasoning parser | `reasoning`, in older versions `reasoning_content` |
| SGLang with a parser, llama.cpp, transformers serve, DeepSeek | `reasoning_content` |
| any without a parser | a think block in `content` |
| the same where the template opens the block in the prompt | `content`, up to a lone `</think>` |
| Mistral | a part of type `thinking` in a list of contents |
"""

from collections.abc import Mapping
from typing import Any

from smolpost.chat.reasoning import CLOSE, OPEN, ends_thinking, split_reasoning
from smolpost.synthesis.records import Reply

FIELDS = ("reasoning", "reasoning_content", "thinking")
_TEXTS = ("text", "thinking", "reasoning", "content", "summary")  # where a part has its text


def reply_of(
    choice: Mapping[str, Any],
    *,
    asked_to_think: bool | None,
    usage: Mapping[str, Any] | None = None,
    attempts: int = 1,
    seconds: float = 0.0,
) -> Reply:
    """One choice of a chat completion as a Reply.

    A think block counts only at the start of the content. A reply that was asked to think and was cut before any tag is
    taken for reasoning, as templates may open the block in the prompt. A reasoning field that is empty or null is no
    think block; an empty block in the content is one, with the reasoning "".

    Args:
        choice: With `message` and `finish_reason`.
        asked_to_think: As the request was.
        usage: Of the completion.
        attempts, seconds: As `Reply`.
    """
    message, finish_reason = choice["message"], choice["finish_reason"]
    content, inside = texts_of(message.get("content"))
    field = next((text for name in FIELDS if (text := _text(message.get(name)))), inside).strip("\r\n")
    tool_calls = message.get("tool_calls") or None
    cut = finish_reason == "length"
    if field.strip():
        reasoning, content = field, _without_copy(content, field).lstrip("\r\n")
        closed = bool(content.strip() or tool_calls) or not cut
    else:
        opened = bool(asked_to_think) and not tool_calls and (cut or CLOSE in content)
        closed = not ends_thinking(content, opened_in_prompt=opened)
        reasoning, content = split_reasoning(content, opened_in_prompt=opened)
    usage = usage or {}
    return Reply(
        content=content,
        reasoning=reasoning,
        finish_reason="tool_calls" if finish_reason == "function_call" else finish_reason,
        closed=closed,
        tool_calls=tool_calls,
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        attempts=attempts,
        seconds=seconds,
        raw=dict(message),
    )


def canonical(reply: Reply) -> str:
    """The content of an assistant turn that holds the reply, as SmolTalk2's rows have it.

    Returns:
        The answer after its think block; the answer alone where the reasoning is empty; a block without its end where
        the reply was cut inside it.
    """
    if not (reply.reasoning or "").strip():
        return reply.content
    return f"{OPEN}\n{reply.reasoning}" + (f"\n{CLOSE}\n\n{reply.content}" if reply.closed else "")


def _without_copy(content: str, field: str) -> str:
    """The content without a think block that is empty or repeats the field, as some gateways give both."""
    inline, answer = split_reasoning(content)
    return answer if inline is not None and inline.strip() in ("", field.strip()) else content


def texts_of(content: Any) -> tuple[str, str]:
    """Answer and reasoning of a message's content, which may be a list of parts."""
    if not isinstance(content, list):
        return _text(content), ""
    thinking = [isinstance(part, dict) and part.get("type") in ("thinking", "reasoning") for part in content]
    answer = "".join(_text(part) for part, thinks in zip(content, thinking, strict=True) if not thinks)
    return answer, "\n".join(_text(part) for part, thinks in zip(content, thinking, strict=True) if thinks)


def _text(value: Any) -> str:
    """The text of a string, of a part, or of a list of parts; "" of anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_text, value))
    if isinstance(value, dict):
        return next((text for name in _TEXTS if (text := _text(value.get(name)))), "")
    return ""
