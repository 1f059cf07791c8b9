"""Replies of several models to the same prompts: what is shown of each, what is wrong with it, and counts by model."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from statistics import mean
from types import MappingProxyType
from typing import Any, NamedTuple

from smolpost.chat.render import text_of
from smolpost.report.samples import Turn, turn_of
from smolpost.report.show_samples import plain
from smolpost.screen import Blocks
from smolpost.synthesis.filters.language import same_language
from smolpost.synthesis.filters.repetition import ends_in_loop, repeated_share
from smolpost.synthesis.records import Message, Reply

MODES = {"think": True, "no_think": False}
MODE_NAMES = {"think": "think", "no_think": "no think", "one": "one mode", "plain": "plain text"}
MOST_REPEATED = 0.3  # share of repeated word 8-grams above which a reply is called a repetition
SURE = 0.8  # confidence of the detected language
HINTS = {  # what can be wrong with a reply -> what it means
    "cut": "the reply reached its longest length",
    "open think": "the think block never ended",
    "empty": "there is no answer and no tool call",
    "no think": "think mode, but no reasoning",
    "thinks": "no-think mode, but reasoning",
    "repeats": f"it ends in a loop, or more than {MOST_REPEATED:.0%} of its word 8-grams occurred before in it",
    "language": "the answer is in another language than the question",
}


ALWAYS = ("cut", "open think", "empty")  # hints whose counts show though they are 0


class Prompt(NamedTuple):
    """What every model is asked.

    Attributes:
        name: The row's own `id`, or its number in the file, from 1.
        messages: Up to the reply that is asked for. They set no think mode: each mode is asked for.
        tools: JSON schemas of functions, or None.
        template_kwargs: Other variables of the chat template.
    """

    name: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = MappingProxyType({})


class Given(NamedTuple):
    """What came back for one request: a reply, or the reason why there is none."""

    reply: Reply | None
    error: str | None


class Column(NamedTuple):
    """One model.

    Attributes:
        about: Where it lies and how its prompts were rendered.
        replies: (number of the prompt, mode, number of the sample) -> what came back; mode by mode.
    """

    name: str
    about: str
    replies: Mapping[tuple[int, str, int], Given]

    @property
    def modes(self) -> list[str]:
        return list(dict.fromkeys(mode for _, mode, _ in self.replies))


class ShownReply(NamedTuple):
    """One reply as the page shows it.

    Attributes:
        hints: Names of HINTS.
        tokens: Of the reply; None where the server does not say.
        end: Why it ended.
    """

    model: str
    mode: str
    turn: Turn | None
    hints: tuple[str, ...]
    tokens: int | None
    end: str
    error: str | None


def shown_replies(columns: Sequence[Column], prompts: Sequence[Prompt]) -> dict[int, list[ShownReply]]:
    """Number of the prompt -> its replies, model by model and mode by mode."""
    found: dict[int, list[ShownReply]] = {number: [] for number in range(len(prompts))}
    for column in columns:
        for (number, mode, _), given in column.replies.items():
            found[number].append(_shown(column.name, mode, question_of(prompts[number].messages), given))
    return found


def _shown(model: str, mode: str, question: str, given: Given) -> ShownReply:
    reply = given.reply
    if reply is None:
        return ShownReply(model, mode, None, (), None, "", given.error)
    message = {"role": "assistant", "content": "", "tool_calls": reply.tool_calls}
    turn = turn_of(message)._replace(reasoning=reply.reasoning, text=reply.content)
    return ShownReply(
        model, mode, turn, hints(reply, mode, question), reply.completion_tokens, reply.finish_reason, None
    )


def hints(reply: Reply, mode: str, question: str) -> tuple[str, ...]:
    """What is wrong with a reply at first sight: names of HINTS."""
    thinks, answers = bool((reply.reasoning or "").strip()), bool(reply.content.strip())
    texts = [text for text in (reply.reasoning, reply.content) if text]
    found = {
        "cut": reply.finish_reason == "length",
        "open think": not reply.closed,
        "empty": not answers and not reply.tool_calls,
        "no think": mode == "think" and not thinks,
        "thinks": mode == "no_think" and thinks,
        "repeats": any(map(ends_in_loop, texts)) or repeated_share("\n".join(texts)) > MOST_REPEATED,
        "language": answers and mode != "plain" and _other_language(question, reply.content),
    }
    return tuple(name for name, there in found.items() if there)


@cache
def knows_languages() -> bool:
    """Whether lingua is installed, which detects languages."""
    return find_spec("lingua") is not None


def _other_language(question: str, answer: str) -> bool:
    return knows_languages() and not same_language(question, answer, SURE).passed


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Text of the last user turn."""
    return next(text_of(message.get("content")) for message in reversed(messages) if message["role"] == "user")


def facts_table(replies: Iterable[ShownReply]) -> Blocks:
    """For each model and mode: replies, their mean length, and how many have each hint."""
    heads, rows = facts(replies)
    return Blocks(heads, rows, names=2)


def facts(replies: Iterable[ShownReply]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of `facts_table`; the first two columns name model and mode."""
    by_model: dict[tuple[str, str], list[ShownReply]] = {}
    for one in replies:
        by_model.setdefault((one.model, one.mode), []).append(one)
    there = {name for found in by_model.values() for one in found for name in one.hints}
    names, rows = [name for name in known_hints() if name in there or name in ALWAYS], []
    for (model, mode), found in by_model.items():
        tokens = [one.tokens for one in found if one.tokens is not None]
        counts = [f"{sum(name in one.hints for one in found):,}" for name in names]
        failed = sum(one.error is not None for one in found)
        length = f"{mean(tokens):,.0f}" if tokens else "-"
        rows.append([plain(model), MODE_NAMES[mode], f"{len(found) - failed:,}", f"{failed:,}", length, *counts])
    return ["model", "mode", "replies", "failed", "mean tokens", *names], rows


def known_hints() -> dict[str, str]:
    """HINTS, without the language where nothing detects it."""
    return {name: text for name, text in HINTS.items() if name != "language" or knows_languages()}
