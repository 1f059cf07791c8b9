"""Conversations to text: the template, its variables, and the spans that the policy has to produce.

The template alone decides the text. Before that, two effects of Arrow and JSON files on rows are undone: keys that
have None count as missing, and tool-call arguments written as JSON strings become objects.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from smolpost.chat.clock import frozen
from smolpost.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # OpenAI's: role, content, tool_calls, ...
Tool = dict[str, Any] | Callable  # a JSON schema, or a documented function

_FOLDER = Path(__file__).parent / "templates"

# SmolTalk2's columns: a row may have them even if the template does not read them.
_ROW_KWARGS = ("custom_instructions", "enable_thinking", "python_tools", "xml_tools")

#: Roles of tool results.
RESULT_ROLES = ("tool", "function", "ipython")

# A template is a program: with unexpected values it may raise other errors than a TemplateError.
TEMPLATE_ERRORS = (jinja2.exceptions.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def _names() -> dict[str, Path]:
    """This package's templates: name -> file."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.jinja"))}


def load_template(name: str | Path) -> str:
    """The text of a chat template; argument and errors are those of `template_file`."""
    return template_file(name).read_text(encoding="utf-8")


def template_file(name: str | Path) -> Path:
    """The file of a chat template.

    Args:
        name: A template of this package (the file's name without `.jinja`), or the path of a .jinja file.
    Raises:
        UserError: There is no such template.
    """
    known = _names()
    path = known.get(str(name), Path(name))
    if path.suffix != ".jinja" or not path.is_file():
        raise UserError(
            f"chat template {str(name)!r} does not exist; use one of {', '.join(known)} or the path of a .jinja file"
        )
    return path


def has_foreign_tags(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template has {% generation %} tags and is not one of this package's, whose tags are tested."""
    template = _template_of(tokenizer)
    return _has_generation_tags(template) and template not in map(load_template, _names())


def template_hash(text: str) -> str:
    """16 hex digits of the SHA-256 of a template's text, for manifests and cache keys."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render(
    tokenizer: "PreTrainedTokenizerBase | str",
    messages: list[Message],
    *,
    template_kwargs: dict[str, Any] | None = None,
    tools: list[Tool] | None = None,
    today: str,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation under the tokenizer's chat template.

    Args:
        tokenizer: Only its `chat_template` is used; the text of a template works too.
        messages: OpenAI-style messages; a key with None counts as missing.
        template_kwargs: SmolTalk2's `chat_template_kwargs` (custom_instructions, enable_thinking, python_tools,
            xml_tools) or other variables of the template; None, "" and [] mean "not given".
        tools: JSON schemas (dicts) or documented functions, as `apply_chat_template` takes them.
        today: The date in the text. The clock is never used (`smolpost.chat.clock`), because cached tokens would
            change every day.
        add_generation_prompt: End with the generation prompt, which precedes a reply at inference.
    Raises:
        UserError: The template refuses the messages, or an argument has the wrong type.
    """
    return conversation_of(tokenizer, messages, template_kwargs, tools, today, add_generation_prompt).text()


def render_spans(
    tokenizer: "PreTrainedTokenizerBase | str",
    messages: list[Message],
    *,
    template_kwargs: dict[str, Any] | None = None,
    tools: list[Tool] | None = None,
    today: str,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """`render`, and the characters that the policy has to produce, from the template's {% generation %} tags.

    Returns:
        The text, and [(start, end)] into it, ascending and disjoint: one for each trained assistant message, from the
        first character after the generation prompt up to and including the stop token.
    Raises:
        UserError: As `render`, or the template has no {% generation %} tags.
    """
    conversation = conversation_of(tokenizer, messages, template_kwargs, tools, today, add_generation_prompt)
    if not conversation.marks_spans:
        raise UserError(
            "the chat template has no {% generation %} tags; use smollm3 or chatml, or add the tags around each reply"
        )
    return conversation.render()


@dataclass(frozen=True)
class Conversation:
    """Everything that a template gets for one conversation.

    Attributes:
        template: Text of the chat template.
        messages: Clean messages; arguments of tool calls are objects.
        variables: The row's own variables, checked, without None.
        tools: JSON schemas, or None.
        today: The date, for every way in which the template may ask for it.
        special: The tokenizer's special tokens by name.
        add_generation_prompt: As `render`.
    """

    template: str
    messages: list[Message]
    variables: dict[str, Any]
    tools: list[dict[str, Any]] | None
    today: str
    special: dict[str, str]
    add_generation_prompt: bool = False

    @property
    def marks_spans(self) -> bool:
        """Whether the template has {% generation %} tags."""
        return _has_generation_tags(self.template)

    def text(self) -> str:
        """The rendering; raises as `render`."""
        return self.render()[0]

    def render(self) -> tuple[str, list[tuple[int, int]]]:
        """The text, and [(start, end)] of the template's generation spans in it.

        Raises:
            UserError: The template refuses the messages, or fails on them; the line names the message.
        """
        try:
            return self._render()
        except TEMPLATE_ERRORS as error:
            raise UserError(self._complaint(error)) from error

    def _render(self) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import (
            render_jinja_template,
        )

        texts, spans = render_jinja_template(
            conversations=[self.messages],
            tools=self.tools,
            chat_template=frozen(self.template, self.today),
            return_assistant_tokens_mask=self.marks_spans,
            add_generation_prompt=self.add_generation_prompt,
            **{**self.special, **self.variables},
        )
        return texts[0], spans[0] if self.marks_spans else []

    def _complaint(self, error: Exception) -> str:
        """One line that names the message: the first one with which the rendering fails."""
        text = " ".join(str(error).split())
        if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
            return f"the chat template is not valid jinja: {text}; correct it or use smollm3"
        if re.fullmatch(r"'\w+' is undefined", text):
            return (
                f"{text}: the chat template reads it, but neither the tokenizer nor the row has it; add it to "
                "chat_template_kwargs, or use another template"
            )
        if isinstance(error, jinja2.exceptions.TemplateError) and ("messages[" in text or len(self.messages) < 2):
            return text
        lengths = reversed(range(1, len(self.messages)))
        place = next((f"messages[{i}]: " for i in lengths if self._renders(i)), "")
        if isinstance(error, jinja2.exceptions.TemplateError):
            return f"{place}{text}"
        return (
            f"{place}the chat template fails ({type(error).__name__}: {text}); correct the row or use another template"
        )

    def _renders(self, num_messages: int) -> bool:
        try:
            replace(self, messages=self.messages[:num_messages])._render()
        except TEMPLATE_ERRORS:
            return False
        return True


@cache
def _has_generation_tags(template: str) -> bool:
    return re.search(r"{%-?\s*generation", template) is not None


def conversation_of(
    tokenizer: "PreTrainedTokenizerBase | str",
    messages: list[Message],
    template_kwargs: dict[str, Any] | None,
    tools: list[Tool] | None,
    today: str,
    add_generation_prompt: bool = False,
) -> Conversation:
    """A checked Conversation; the arguments are those of `render`.

    Raises:
        UserError: There is no template, an argument has the wrong type, or a tool result comes before any call.
    """
    template = _template_of(tokenizer)
    messages = _as_the_template_reads(messages)
    _check_order(messages)
    variables = _checked_variables(template_kwargs, template)
    special = {} if isinstance(tokenizer, str) else tokenizer.special_tokens_map
    return Conversation(template, messages, variables, _schemas(tools), today, special, add_generation_prompt)


def _template_of(tokenizer: "PreTrainedTokenizerBase | str") -> str:
    if isinstance(tokenizer, str):
        return tokenizer
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; set its chat_template to load_template('smollm3')")
    return tokenizer.get_chat_template()


def clean_messages(messages: list[Message]) -> list[Message]:
    """Messages without the keys that have None; Arrow adds such keys if the rows of a dataset differ.

    Raises:
        UserError: A message is not a dict.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"messages[{i}]={message!r:.80} is not a message; expected an object with role and content")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or the joined text parts of a list."""
    if isinstance(content, str):
        return content
    return "".join(part_text(part) for part in content) if isinstance(content, list | tuple) else ""


def part_text(part: Any) -> str:
    """The text of one part of a content; "" if it is not a text part."""
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else ""


def _as_the_template_reads(messages: list[Message]) -> list[Message]:
    """Clean messages whose tool calls have objects as arguments; servers also pass them to templates in this form."""
    messages = clean_messages(messages)
    for message in messages:
        if message.get("tool_calls"):
            message["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
        elif message.get("function_call"):
            message["function_call"] = _with_parsed_arguments(message["function_call"])
    return messages


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments parsed from their JSON string; text that is not a JSON object stays."""
    if call.get("function"):
        return {**call, "function": _with_parsed_arguments(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError:
            return call
        if isinstance(parsed, dict):
            return {**call, "arguments": parsed}
    return call


def _check_order(messages: list[Message]) -> None:
    """Refuse a tool result before any assistant turn: there is no call that it could answer."""
    for i, role in enumerate(message.get("role") for message in messages):
        if role == "assistant":
            return
        if role in RESULT_ROLES:
            raise UserError(
                f"messages[{i}].role={role} is a tool result without a call before it; "
                "add the assistant turn that made the call, or make this a user turn"
            )


def _schemas(tools: list[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as JSON schemas; None without tools."""
    from transformers.utils.chat_template_utils import get_json_schema

    for i, tool in enumerate(tools or []):
        if not isinstance(tool, dict) and not callable(tool):
            raise UserError(f"tools[{i}]={tool!r:.80} is not a JSON schema; pass finished strings as xml_tools")
    return [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools or []] or None


def _checked_variables(template_kwargs: dict[str, Any] | None, template: str) -> dict[str, Any]:
    """The template's variables, without the keys that have None.

    None must never reach a template as a value: a truth test would read it as "thinking off".
    """
    variables = {key: value for key, value in (template_kwargs or {}).items() if value is not None}
    thinking = variables.get("enable_thinking", True)
    if not isinstance(thinking, bool):
        raise UserError(f"chat_template_kwargs.enable_thinking={thinking!r} is not a boolean; use true or false")
    for key in variables:
        reserved = key in ("messages", "tools", "today", "strftime_now", "add_generation_prompt")
        if reserved or (key not in _ROW_KWARGS and key not in template):
            raise UserError(f"chat_template_kwargs.{key} is not a variable a row can set; use {', '.join(_ROW_KWARGS)}")
    return variables
