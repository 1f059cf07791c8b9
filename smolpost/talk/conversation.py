"""A conversation with one model: its turns, under which settings each reply came, and the row that it is saved as."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from smolpost.chat.render import Message
from smolpost.data.rows import parse_json
from smolpost.errors import UserError

STOP, CUT, INTERRUPTED = "stop", "cut", "interrupted"


class Said(NamedTuple):
    """A reply.

    Attributes:
        message: The assistant turn, as rows have it: a think block begins its content.
        reasoning: Text of the think block; "" without one.
        answer: The text after it; "" where the block never ended.
        finish: STOP; CUT at its longest length; INTERRUPTED by the user.
        mode: Whether the model was to think; None where that cannot be chosen.
        note: What a user should know of its end; "" where it ended by itself.
        num_tokens, thinking_tokens: Of the reply, and of its think block. A server counts in its own way.
        seconds, thinking_seconds: From the request on.
        seed: Of its random numbers.
    """

    message: Message
    reasoning: str
    answer: str
    finish: str
    mode: bool | None
    note: str
    num_tokens: int
    thinking_tokens: int
    seconds: float
    thinking_seconds: float
    seed: int

    @property
    def whole(self) -> bool:
        """It ended by itself and answers: fit to be trained on."""
        return self.finish == STOP and bool(self.answer.strip() or self.message.get("tool_calls"))

    @property
    def empty(self) -> bool:
        """There is nothing that a turn could hold."""
        return not (self.message.get("content") or "").strip() and not self.message.get("tool_calls")


class Tools(NamedTuple):
    """What a model may call.

    Attributes:
        schemas: OpenAI's JSON schemas.
        xml, python: Texts for SmolTalk2's xml_tools and python_tools.
    """

    schemas: tuple[dict[str, Any], ...] = ()
    xml: tuple[str, ...] = ()
    python: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        """How many there are, in words."""
        number = sum(map(len, self))
        return f"{number} {'tool' if number == 1 else 'tools'}" if number else "no tools"


@dataclass(frozen=True)
class Frame:
    """What stands before the turns.

    Attributes:
        system: Text of the system message; "" without one.
    """

    system: str = ""
    tools: Tools = field(default_factory=Tools)

    def messages(self, turns: list[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *turns]

    @property
    def schemas(self) -> list[dict[str, Any]] | None:
        return list(self.tools.schemas) or None

    def template_kwargs(self, mode: bool | None) -> dict[str, Any]:
        """SmolTalk2's `chat_template_kwargs`."""
        kwargs: dict[str, Any] = {} if mode is None else {"enable_thinking": mode}
        return kwargs | {
            "custom_instructions": "",
            "python_tools": list(self.tools.python),
            "xml_tools": list(self.tools.xml),
        }


class Turn(NamedTuple):
    """
    Attributes:
        said: Of an assistant turn, with the frame in which it came; else None.
    """

    message: Message
    said: Said | None = None
    frame: Frame | None = None


@dataclass
class Conversation:
    """
    Attributes:
        attempts: Replies to the last prompt that were taken back.
        awaited: Calls of the last reply whose results are still to come, each with its id (None without one).
    """

    frame: Frame = field(default_factory=Frame)
    turns: list[Turn] = field(default_factory=list)
    attempts: int = 0
    awaited: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """What a template gets."""
        return self.frame.messages([turn.message for turn in self.turns])

    @property
    def last(self) -> Said | None:
        """The reply with which the conversation ends."""
        return self.turns[-1].said if self.turns else None

    @property
    def unanswered(self) -> bool:
        """It ends with a turn that waits for a reply."""
        return bool(self.turns) and self.turns[-1].said is None and not self.awaited

    def ask(self, text: str) -> None:
        """Add a user turn, in place of one that got no reply."""
        if self.turns and self.turns[-1].message["role"] == "user":
            self.turns.pop()
        self.turns.append(Turn({"role": "user", "content": text}))
        self.attempts, self.awaited = 0, []

    def answer(self, said: Said, calls: list[tuple[str, str | None]]) -> None:
        """Add the reply.

        Args:
            calls: Its calls, each in words and with its id.
        """
        self.turns.append(Turn(said.message, said, self.frame))
        self.awaited = calls

    def give_result(self, text: str) -> None:
        """Add the result of the first call that waits for one."""
        _, identity = self.awaited.pop(0)
        self.turns.append(Turn({"role": "tool", "content": text} | ({"tool_call_id": identity} if identity else {})))
        self.attempts = 0

    def take_back_reply(self) -> bool:
        """Make the last reply unsaid, so that the model can try again; False where there is nothing to reply to."""
        replies = [i for i, turn in enumerate(self.turns) if turn.said]
        if self.unanswered:
            return True
        if not replies:
            return False
        del self.turns[replies[-1] :]
        self.awaited = []
        self.attempts += 1
        return True

    def take_back_exchange(self) -> str | None:
        """Remove the last user turn and all after it; its text, or None where there is none."""
        places = [i for i, turn in enumerate(self.turns) if turn.message["role"] == "user"]
        if not places:
            return None
        text = self.turns[places[-1]].message["content"]
        del self.turns[places[-1] :]
        self.attempts, self.awaited = 0, []
        return text

    def clear(self) -> None:
        """Begin again, in the same frame."""
        self.turns, self.attempts, self.awaited = [], 0, []

    def row(self, source: str) -> dict[str, Any] | None:
        """The conversation up to its last whole reply, as a SmolTalk2 row; None without such a reply.

        The row's mode, system message and tools are those of that reply. Earlier replies that came under others, or
        that were cut or interrupted, are there as context with `train: false`.
        """
        place = next((i for i in reversed(range(len(self.turns))) if self._is_whole(i)), None)
        if place is None:
            return None
        said, frame = self.turns[place].said, self.turns[place].frame
        mode = bool(said.reasoning.strip()) if said.mode is None else said.mode
        turns = [
            turn.message | {"train": False}
            if turn.said and not (turn.said.whole and (turn.said.mode, turn.frame) == (said.mode, frame))
            else turn.message
            for turn in self.turns[: place + 1]
        ]
        row = {"messages": frame.messages(turns), "chat_template_kwargs": frame.template_kwargs(mode)}
        return row | ({"tools": frame.schemas} if frame.schemas else {}) | {"source": source}

    def _is_whole(self, place: int) -> bool:
        said = self.turns[place].said
        return said is not None and said.whole

    def with_system(self, text: str) -> None:
        self.frame = replace(self.frame, system=text)

    def with_tools(self, tools: Tools) -> None:
        self.frame = replace(self.frame, tools=tools)


def read_tools(file: Path) -> Tools:
    """The tools of a JSON file: a list of OpenAI's schemas, a list of texts (xml_tools), or an object with lists under
    tools, xml_tools and python_tools.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    expected = (
        'write a list of JSON schemas as [{"type": "function", "function": {"name": ..., "parameters": {...}}}], a '
        'list of texts, or {"xml_tools": [...]} or {"python_tools": [...]}'
    )
    try:
        content = parse_json(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error}); {expected}") from error
    lists = content if isinstance(content, dict) else {"tools": content}
    known = {"tools", "xml_tools", "python_tools"}
    if not lists.keys() <= known or not all(isinstance(entries, list) for entries in lists.values()):
        raise UserError(f"{file} holds no tools; {expected}")
    schemas = tuple(entry for entry in lists.get("tools", []) if not isinstance(entry, str))
    texts = [entry for entry in lists.get("tools", []) if isinstance(entry, str)] + lists.get("xml_tools", [])
    for i, schema in enumerate(schemas):
        function = schema.get("function", schema) if isinstance(schema, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{file}: tools[{i}] names no function; {expected}")
    xml, python = (tuple(map(_text, entries)) for entries in (texts, lists.get("python_tools", [])))
    tools = Tools(schemas, xml, python)
    if not tools:
        raise UserError(f"{file} holds no tools; {expected}")
    return tools


def _text(entry: Any) -> str:
    """A tool as templates list it; objects are written as JSON."""
    return entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
