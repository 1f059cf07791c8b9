"""A conversation row as a prompt and the reply that answers it."""

from collections.abc import Iterator
from contextlib import contextmanager

from smolpost.chat.render import text_of
from smolpost.errors import UserError


def where(row: dict) -> str:
    """file:row where the row remembers it, else its source."""
    return getattr(row, "where", f"a row of source {row.get('source')!r}")


@contextmanager
def named(row: dict) -> Iterator[None]:
    """Say which row a template refuses."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where(row)}: {error}") from error


def conversation(row: dict, mixture: str) -> list[dict]:
    """The row's messages.

    Args:
        mixture: Key of the mixture the row came in, for the message.
    Raises:
        UserError: The row has none.
    """
    if not row.get("messages"):
        raise UserError(
            f"{where(row)}: has no messages but the columns {', '.join(row)}; expected a conversation; "
            f"leave its source out of the {mixture} mixture"
        )
    return row["messages"]


def split_last_reply(messages: list[dict]) -> tuple[list[dict], str]:
    """Messages before the last assistant turn, and its text; all messages and "" without an assistant turn."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        return messages, ""
    content = messages[last].get("content")
    return messages[:last], content if isinstance(content, str) else ""


def mode_of(row: dict) -> str:
    """think | no_think | text: the mode that a row asks its template for; conversations think by default."""
    if not (row.get("chosen") or row.get("messages")):
        return "text"
    return "no_think" if stated_mode(row) is False else "think"


def stated_mode(row: dict) -> bool | None:
    """The think mode that a conversation states, or the chosen side of a pair; None if it states none.

    The words /think and /no_think in the system message override `enable_thinking`, as in the smollm3 template.
    """
    first = (row.get("chosen") or row["messages"])[0]
    words = text_of(first.get("content")).split() if first.get("role") == "system" else []
    if "/no_think" in words or "/think" in words:
        return "/no_think" not in words
    return (row.get("chat_template_kwargs") or {}).get("enable_thinking")
