"""Cuts a rendering into pieces and gives each character its fate, before anything is tokenized."""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from smolpost.chat.contents import Content, locate
from smolpost.chat.fates import Fate
from smolpost.chat.reasoning import reasoning_ranges, split_reasoning
from smolpost.chat.render import RESULT_ROLES, Conversation, Message, text_of
from smolpost.chat.shown import Loss, losses
from smolpost.chat.spans import EndlessTurn, Span, assistant_turns, check_stop, generation_spans, prefix_spans, turn_end
from smolpost.chat.text_pieces import Ranges, Vocabulary, check_encodable, vocabulary_of
from smolpost.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BY_PREFIXES = 1000  # replies; each takes two renderings of the conversation, so more would take many seconds
ROLES = ("system", "user", "assistant", "tool", "all")


@dataclass(frozen=True)
class Policy:
    """What trains.

    Attributes:
        roles: The roles whose turns train: system, user, assistant, tool. A turn trains from the first character after
            its header up to and including its stop token, unless its message has `train: false` (or
            `training: false`). With `all`, every token trains, the template's too.
        reasoning: False: the non-empty think blocks of replies do not train, tags included; the rest does.
        last_turn_only: Only the last turn that would train does.
    Raises:
        UserError: A role is unknown.
    """

    roles: tuple[str, ...] = ("assistant",)
    reasoning: bool = True
    last_turn_only: bool = False

    def __post_init__(self) -> None:
        for role in self.roles:
            if role not in ROLES:
                raise UserError(f"role {role!r} cannot be trained; use {', '.join(ROLES)}")

    def turns(self, messages: list[Message]) -> list[int]:
        """Indices of the messages that train."""
        chosen = [i for i, m in enumerate(messages) if _role(m) in self.roles and not _left_out(m)]
        return chosen[-1:] if self.last_turn_only else chosen


REPLIES = Policy()


@dataclass(frozen=True)
class Layout:
    """A rendering, ready to be tokenized; all places are character positions.

    Attributes:
        pieces: [(start, end, plain)], each tokenized separately; plain as in `text_pieces.TextPiece`.
        ranges: [(start, end, fate)], ascending; a later range overwrites an earlier one.
        neutral: [(start, end)] of the control tokens that are only text.
        trained_starts: Starts of the replies that are not marked as left out.
        thinks, lost: As in `masks.Encoded`.
        trains_all: Every token trains; the ranges are ignored.
        boundary: The tokens before this place are counted.
    """

    text: str
    pieces: list[tuple[int, int, bool]]
    ranges: list[tuple[int, int, Fate]]
    neutral: list[tuple[int, int]]
    trained_starts: frozenset[int]
    thinks: bool
    lost: tuple[Loss, ...]
    trains_all: bool
    boundary: int = 0


def lay_out(
    tokenizer: "PreTrainedTokenizerBase",
    conversation: Conversation,
    policy: Policy,
    *,
    first: int = 0,
    trim: bool = False,
    by_prefixes: bool = False,
) -> Layout:
    """The Layout of a conversation.

    Args:
        conversation: A `smolpost.chat.render.Conversation`.
        policy: What trains.
        first: Index of the first message that may train.
        trim: Drop trailing line breaks.
        by_prefixes: Ignore the template's {% generation %} tags.
    Raises:
        UserError: As `masks.encode`.
    """
    flagged, conversation = conversation.messages, without_flags(conversation)
    vocabulary = vocabulary_of(tokenizer)
    text, marked = conversation.render()
    check_encodable(text, conversation)
    spans, unknown = generation_spans(conversation, text, marked, vocabulary.stops), {}
    if by_prefixes or not one_each(spans, conversation):
        check_number(conversation)
        spans, unknown = prefix_spans(conversation, text, vocabulary.stops)
    turns = [i for i in policy.turns(flagged) if i >= first]
    trains_all = "all" in policy.roles
    for i, error in unknown.items():
        if i in turns or (trains_all and isinstance(error, EndlessTurn)):
            raise error
    others = [i for i in turns if _role(flagged[i]) != "assistant"]
    contents, neutral = locate(conversation, text, spans, vocabulary, exact=bool(others))
    ranges = [(c.start, c.end, c.fate) for c in contents or []]
    ranges += [(*_search_reply(conversation, text, i), Fate.REPLY) for i in unknown]
    words, only_text, trained = neutral.copy(), Ranges(neutral), set(turns)
    replies = [i for i in assistant_turns(flagged) if trains_all or i in trained]
    thinks = False
    for span in spans:
        ranges.append((span.start, span.end, Fate.TRAINED if span.message in trained else Fate.REPLY))
        if span.message in trained or trains_all:
            check_stop(text, span, vocabulary.stops)
            reasoning = _reasoning(text, span, vocabulary, words)
            thinks = thinks or (bool(reasoning) and (policy.reasoning or trains_all))
            if not policy.reasoning:
                ranges += [(a, b, Fate.REASONING) for a, b in reasoning]
        neutral += _inner_stops(text, span, vocabulary, tokenizer.eos_token, only_text)
    ranges += [(*_turn(conversation, text, contents, i, vocabulary), Fate.TRAINED) for i in others]
    ranges.sort(key=lambda painted: painted[0])
    cut_at = [span for span in spans if not _left_out(flagged[span.message])]
    if trim:
        text = text.rstrip("\n")
    edges = [edge for span in cut_at for edge in (span.start, span.end) if edge < len(text)]
    starts = frozenset(span.start for span in cut_at)
    neutral.sort()
    lost = losses(conversation, text, spans, replies, vocabulary.stops)
    return Layout(text, vocabulary.cut(text, edges, neutral), ranges, neutral, starts, thinks, lost, trains_all)


def check_number(conversation: Conversation) -> None:
    """Refuse a conversation whose replies would take too long to find, with two renderings for each.

    Raises:
        UserError: It has more than MAX_BY_PREFIXES replies.
    """
    if (number := len(assistant_turns(conversation.messages))) > MAX_BY_PREFIXES:
        raise UserError(
            f"messages have {number:,} replies, above the {MAX_BY_PREFIXES:,} that can be found without "
            "{% generation %} tags; put the tags around the reply and its stop token in the template, or split the row"
        )


def one_each(spans: list[Span], conversation: Conversation) -> bool:
    """Whether the template's tags give one span for each reply."""
    return conversation.marks_spans and all(span.message is not None for span in spans)


def _turn(
    conversation: Conversation, text: str, contents: list[Content] | None, i: int, vocabulary: Vocabulary
) -> tuple[int, int]:
    """(start, end) of a turn that is not a reply: its text and its stop token; of an empty turn, the stop token."""
    start = next((content.start for content in contents or [] if content.message == i), None)
    is_empty = not text_of(conversation.messages[i].get("content")).strip()
    if start is None and not is_empty:
        raise UserError(
            f"messages[{i}]: the chat template changes the text of this {_role(conversation.messages[i])} turn, so its "
            "start cannot be found; remove the role from train_roles, or use another template"
        )
    end = turn_end(conversation, text, i, vocabulary.stops)
    if start is None:
        start = end - len(next(stop for stop in vocabulary.stops if text.endswith(stop, 0, end)))
    return start, end


def _search_reply(conversation: Conversation, text: str, i: int) -> tuple[int, int]:
    """(start, end) of a reply that the template rewrites later: its answer, if that occurs once; otherwise (0, 0)."""
    answer = split_reasoning(text_of(conversation.messages[i].get("content")))[1].strip()
    start = text.find(answer)
    once = answer and start >= 0 and text.find(answer, start + 1) < 0
    return (start, start + len(answer)) if once else (0, 0)


def _inner_stops(
    text: str, span: Span, vocabulary: Vocabulary, eos: str | None, only_text: Ranges
) -> list[tuple[int, int]]:
    """[(start, end)] of stop tokens inside a reply that rendering made: only the last one ends the reply."""
    stop = eos if eos and text.endswith(eos, 0, span.end) else None
    stop = stop or next((s for s in vocabulary.stops if text.endswith(s, 0, span.end)), None)
    found, place = [], text.find(stop, span.start, span.end - len(stop)) if stop else -1
    while place >= 0:
        if not only_text.meet(place, place + len(stop)):
            found.append((place, place + len(stop)))
        place = text.find(stop, place + len(stop), span.end - len(stop))
    return found


def _reasoning(text: str, span: Span, vocabulary: Vocabulary, words: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """[(start, end)] of the reasoning of a reply, found by its text: a tokenizer may have no tokens for the tags.

    A think block that never closes includes the stop token.

    Args:
        words: [(start, end)] of the control tokens that are only text, ascending.
    """
    stop = next((stop for stop in vocabulary.stops if text.endswith(stop, 0, span.end)), "")
    end = max(span.start, span.end - len(stop))
    body, done = [], span.start
    for a, b in words[bisect_left(words, (span.start,)) : bisect_left(words, (end,))]:
        body += [text[done:a], "\0" * (b - a)]  # a tag that is only text does not count
        done = b
    ranges = reasoning_ranges("".join([*body, text[done:end]]))
    return [(span.start + a, span.end if span.start + b == end else span.start + b) for a, b in ranges]


def without_flags(conversation: Conversation) -> Conversation:
    """The conversation without the keys train and training: templates then mark each reply, and the policy decides."""
    flags = ("train", "training")
    if not any(flag in message for message in conversation.messages for flag in flags):
        return conversation
    messages = [{key: value for key, value in m.items() if key not in flags} for m in conversation.messages]
    return replace(conversation, messages=messages)


def _left_out(message: Message) -> bool:
    return message.get("train") is False or message.get("training") is False


def _role(message: Message) -> str | None:
    return "tool" if message.get("role") in RESULT_ROLES else message.get("role")
