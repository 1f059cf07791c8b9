"""Conversations as requests to a teacher, replies as turns, and finished conversations as rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smolpost.chat.reasoning import OPEN, split_reasoning
from smolpost.chat.render import text_of
from smolpost.inference.seeds import derive_seed
from smolpost.synthesis.records import Message, Prompt, Reply, Request
from smolpost.synthesis.replies import canonical
from smolpost.synthesis.settings import Teacher

TEMPLATE_TOOLS = ("xml_tools", "python_tools")  # tools that only SmolLM3's templates write


@dataclass(frozen=True)
class Asker:
    """Makes requests to one teacher.

    Attributes:
        role: Of the teacher in its job.
        seed: Of the stage. A request's own seed follows from it, the role, the prompt's id and `turn`.
    """

    role: str
    teacher: Teacher
    seed: int

    def request(
        self, prompt: Prompt, messages: Sequence[Message], thinking: bool | None, turn: int | str = 0
    ) -> Request:
        """The request for the next assistant turn.

        A checkpoint of the run gets the turns as its template renders them in training. A server gets the row's custom
        instructions as a part of the system message, and earlier replies without their reasoning, as the templates of
        reasoning models drop it themselves.

        Args:
            turn: Tells apart the requests of one prompt.
        """
        seed = derive_seed(self.seed, self.role, prompt.id, turn)
        variables = dict(prompt.row.get("chat_template_kwargs") or {})
        variables.pop("enable_thinking", None)
        if self.teacher.stage:
            return Request(list(messages), thinking, seed, prompt.row.get("tools"), variables or None)
        instructions = variables.get("custom_instructions") or ""
        asked = [_without_reasoning(message) for message in instructed(messages, instructions)]
        return Request(asked, thinking, seed, prompt.row.get("tools"))

    def turn(self, reply: Reply) -> Message:
        """The reply as an assistant turn, in canonical form and with its reasoning.

        The text of a checkpoint's reply stays as the model wrote it: a model learns best from its own tokens.
        """
        written = (reply.raw or {}).get("content")
        starts = OPEN if reply.reasoning is not None else ""
        if not self.teacher.stage or not isinstance(written, str) or not written.startswith(starts):
            return _turn_of(reply)
        return _turn_of(reply) | {"content": written}

    def cannot_ask(self, row: dict[str, Any]) -> bool:
        """Whether a row lists tools in a form that only a template of SmolLM3 can show."""
        variables = row.get("chat_template_kwargs") or {}
        return not self.teacher.stage and any(variables.get(name) for name in TEMPLATE_TOOLS)


def instructed(messages: Sequence[Message], instructions: str) -> list[Message]:
    """The turns with further instructions at the end of the system message, as the smollm3 template puts them."""
    if not instructions.strip():
        return list(messages)
    system = text_of(messages[0].get("content")) if messages[0]["role"] == "system" else ""
    texts = dict.fromkeys(text.strip() for text in (system, instructions) if text.strip())
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest]


def _without_reasoning(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    if isinstance(kept.get("content"), str):
        kept["content"] = split_reasoning(kept["content"])[1]
    return kept


def _turn_of(reply: Reply) -> Message:
    calls = {"tool_calls": reply.tool_calls} if reply.tool_calls else {}
    return {"role": "assistant", "content": canonical(reply), **calls}


def has_answer(reply: Reply) -> bool:
    """Whether a conversation can go on after the reply."""
    return reply.closed and bool(reply.content.strip() or reply.tool_calls)


def mode_of_replies(thinking: bool | None, teacher: Teacher, replies: Sequence[Reply]) -> bool:
    """The mode of a row, where it may have been left to the teacher's template: SmolLM3's think then."""
    if thinking is not None:
        return thinking
    return bool(teacher.stage) or any(reply.reasoning is not None for reply in replies)


def row_of(prompt: Prompt, thinking: bool, suffix: str, conversations: Mapping[str, list[Message]]) -> dict[str, Any]:
    """A SmolTalk2 row.

    Args:
        thinking: Its mode.
        suffix: Of its source.
        conversations: Column -> turns.
    """
    variables = prompt.row.get("chat_template_kwargs") or {}
    row = {
        **conversations,
        "chat_template_kwargs": {
            "custom_instructions": variables.get("custom_instructions") or "",
            "enable_thinking": thinking,
            "python_tools": variables.get("python_tools") or [],
            "xml_tools": variables.get("xml_tools") or [],
        },
        "source": f"{prompt.source}{suffix}",
    }
    return row | ({"tools": prompt.row["tools"]} if prompt.row.get("tools") else {})
