"""Conversations to token ids and the fate of every token: trained, or the reason why it is not.

Text is cut at the edges of the replies, and each piece is tokenized separately. No token crosses an edge, so the ids
are those of inference: a tokenized prompt, then the reply. The ids do not depend on what trains.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from smolpost.chat.fates import Fate
from smolpost.chat.layout import MAX_BY_PREFIXES, REPLIES, Layout, Policy, lay_out, one_each, without_flags
from smolpost.chat.render import Conversation, Message, Tool, clean_messages, conversation_of
from smolpost.chat.shown import Omission
from smolpost.chat.spans import check_prefix, differ, generation_spans, prefix_spans
from smolpost.chat.text_pieces import LONGEST, TextPiece, Vocabulary, vocabulary_of
from smolpost.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """A tokenized conversation.

    Attributes:
        input_ids: [L] token ids.
        fates: [L] `Fate` of each token; packing sets FIRST.
        neutralised: Number of control tokens in the row's own texts that became plain text.
        thinks: Whether a non-empty think block trains; blocks are found by their text.
        lost: What the template leaves out of the conversation.
    """

    input_ids: list[int]
    fates: list[int]
    neutralised: int
    thinks: bool = False
    lost: tuple[Omission, ...] = ()


class EncodedCompletion(NamedTuple):
    """A tokenized prompt and the completion that follows it.

    Attributes:
        prompt_ids: [P] token ids.
        completion_ids: [C] token ids, ending with the stop token.
        prompt_fates: [P] `Fate` of each token; nothing in the prompt trains.
        completion_fates: [C] `Fate` of each token; a completion of several turns also has user and tool turns.
        neutralised, thinks, lost: As in `Encoded`.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    prompt_fates: list[int]
    completion_fates: list[int]
    neutralised: int
    thinks: bool
    lost: tuple[Omission, ...]


class EncodedPair(NamedTuple):
    """A tokenized preference pair; each side is the prompt followed by its completion.

    Attributes:
        prompt_ids: [P] token ids that both sides share.
        chosen_ids: [C] token ids, ending with the stop token.
        rejected_ids: [R] token ids, ending with the stop token.
        prompt_fates: [P] `Fate` of each token; nothing in the prompt trains.
        chosen_fates: [C] `Fate` of each token; a completion of several turns also has user and tool turns.
        rejected_fates: [R] `Fate` of each token, like chosen_fates.
        neutralised: As in `Encoded`; tokens of the prompt count once.
        thinks: As in `Encoded`, for the chosen side.
        lost: As in `Encoded`, for both sides.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_fates: list[int]
    chosen_fates: list[int]
    rejected_fates: list[int]
    neutralised: int
    thinks: bool
    lost: tuple[Omission, ...]


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    template_kwargs: dict[str, Any] | None = None,
    tools: list[Tool] | None = None,
    today: str,
    policy: Policy = REPLIES,
) -> Encoded:
    """Tokenize one conversation.

    Args:
        tokenizer: A fast tokenizer with a chat template, with or without {% generation %} tags.
        messages, template_kwargs, tools, today: As `smolpost.chat.render.render`.
        policy: What trains; it does not change the ids.
    Raises:
        UserError: The template refuses the messages, or the edges of a turn that trains cannot be found.
    """
    conversation = conversation_of(tokenizer, messages, template_kwargs, tools, today)
    return _tokenize(tokenizer, [lay_out(tokenizer, conversation, policy)])[0].encoded()


def encode_batch(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: list[list[Message]],
    *,
    template_kwargs: list[dict[str, Any] | None] | None = None,
    tools: list[list[Tool] | None] | None = None,
    today: str,
    policy: Policy = REPLIES,
) -> list[Encoded]:
    """`encode` for many conversations in one call of the fast tokenizer.

    Args:
        conversations: [B] lists of messages.
        template_kwargs: [B] dicts or None, or None for all.
        tools: [B] lists or None, or None for all.
        today, policy: As `encode`, for all rows.
    Returns:
        [B] Encoded.
    Raises:
        UserError: As `encode`; the text begins with `rows[i]: `.
        ValueError: The lists differ in length.
    """
    rows = []
    no_values = [None] * len(conversations)
    columns = zip(conversations, template_kwargs or no_values, tools or no_values, strict=True)
    for i, (messages, kwargs, row_tools) in enumerate(columns):
        try:
            conversation = conversation_of(tokenizer, messages, kwargs, row_tools, today)
            rows.append(lay_out(tokenizer, conversation, policy))
        except UserError as error:
            raise UserError(f"rows[{i}]: {error}") from error
    return [tokens.encoded() for tokens in _tokenize(tokenizer, rows)]


def encode_pair(
    tokenizer: "PreTrainedTokenizerBase",
    chosen: list[Message],
    rejected: list[Message],
    *,
    template_kwargs: dict[str, Any] | None = None,
    tools: list[Tool] | None = None,
    today: str,
    policy: Policy = REPLIES,
) -> EncodedPair:
    """Tokenize a preference pair given as two full conversations.

    The prompt is the longest common prefix of messages. If both sides continue with a trained reply, it ends with the
    generation prompt. Prompt and completion together equal `encode` of the conversation without its trailing line
    break.

    Args:
        tokenizer, template_kwargs, tools, today: As `encode`.
        chosen, rejected: Messages. If one side is a prefix of the other, its last message is its completion.
        policy: Which tokens of each completion are scored.
    Raises:
        UserError: As `encode`, or the sides do not share a first message, or the template rewrites earlier turns.
    """
    chosen, rejected = clean_messages(chosen), clean_messages(rejected)
    num_common = num_common_messages(chosen, rejected)
    sides = [conversation_of(tokenizer, side, template_kwargs, tools, today) for side in (chosen, rejected)]
    rows = [lay_out(tokenizer, side, policy, first=num_common, trim=True) for side in sides]
    boundary = _common_prompt_length(replace(sides[0], messages=sides[0].messages[:num_common]), rows)
    tokens = _tokenize(tokenizer, [replace(row, boundary=boundary) for row in rows])
    length = min(side.num_before for side in tokens)
    one, two = (side.ids[:length] for side in tokens)
    if one != two:
        length = next(i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)
    neutral = [(i, span) for i, row in enumerate(rows) for span in row.neutral if i == 0 or span[0] >= boundary]
    (chosen_ids, chosen_fates), (rejected_ids, rejected_fates) = ((side.ids, side.fates) for side in tokens)
    return EncodedPair(
        chosen_ids[:length],
        chosen_ids[length:],
        rejected_ids[length:],
        chosen_fates[:length],
        chosen_fates[length:],
        rejected_fates[length:],
        len(neutral),
        rows[0].thinks,
        tuple(dict.fromkeys(rows[0].lost + rows[1].lost)),
    )


def encode_completion(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    num_prompt: int,
    *,
    template_kwargs: dict[str, Any] | None = None,
    tools: list[Tool] | None = None,
    today: str,
    policy: Policy = REPLIES,
) -> EncodedCompletion:
    """Tokenize a conversation, cut into a prompt and its completion.

    The prompt ends with the generation prompt if a trained reply follows it, so its ids are those of `encode_prompt`.
    Prompt and completion together equal `encode` of the conversation without its trailing line break.

    Args:
        tokenizer, template_kwargs, tools, today: As `encode`.
        messages: The prompt's messages, then the completion's.
        num_prompt: Messages of the prompt, at least one.
        policy: Which tokens of the completion train.
    Raises:
        UserError: As `encode`, or the template rewrites the prompt when the completion follows.
    """
    conversation = conversation_of(tokenizer, clean_messages(messages), template_kwargs, tools, today)
    row = lay_out(tokenizer, conversation, policy, first=num_prompt, trim=True)
    boundary = _common_prompt_length(replace(conversation, messages=conversation.messages[:num_prompt]), [row])
    [tokens] = _tokenize(tokenizer, [replace(row, boundary=boundary)])
    length = tokens.num_before
    return EncodedCompletion(
        tokens.ids[:length],
        tokens.ids[length:],
        tokens.fates[:length],
        tokens.fates[length:],
        len(row.neutral),
        row.thinks,
        row.lost,
    )


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    template_kwargs: dict[str, Any] | None = None,
    tools: list[Tool] | None = None,
    today: str,
) -> list[int]:
    """[L] ids of a conversation up to the start of its next reply: the ids that precede that reply in training.

    Args, Raises: As `encode`.
    """
    conversation = conversation_of(tokenizer, messages, template_kwargs, tools, today, add_generation_prompt=True)
    return _tokenize(tokenizer, [lay_out(tokenizer, conversation, Policy(roles=()))])[0].ids


def trained_by_prefixes(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    template_kwargs: dict[str, Any] | None = None,
    tools: list[Tool] | None = None,
    today: str,
    policy: Policy = REPLIES,
) -> Encoded:
    """`encode` by differences of renderings only; the template's {% generation %} tags are ignored.

    Raises:
        UserError: As `encode`, or the template rewrites earlier turns.
    """
    conversation = conversation_of(tokenizer, messages, template_kwargs, tools, today)
    return _tokenize(tokenizer, [lay_out(tokenizer, conversation, policy, by_prefixes=True)])[0].encoded()


def check_spans(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    *,
    template_kwargs: dict[str, Any] | None = None,
    tools: list[Tool] | None = None,
    today: str,
) -> None:
    """Refuse a template whose {% generation %} tags do not enclose exactly the replies after their prompts.

    A reply that cannot be found by its prompt, because the template rewrites earlier turns, is not checked.

    Raises:
        UserError: Names the first reply that differs by more than white space; or as `encode`.
    """
    conversation = without_flags(conversation_of(tokenizer, messages, template_kwargs, tools, today))
    text, marked = conversation.render()
    stops = vocabulary_of(tokenizer).stops
    tagged = generation_spans(conversation, text, marked, stops)
    if not one_each(tagged, conversation) or len(tagged) > MAX_BY_PREFIXES:
        return  # the tags are not used, or there is nothing to compare them with
    tags = {span.message: span for span in tagged}
    for told in prefix_spans(conversation, text, stops)[0]:
        if differ(text, told, tags[told.message]):
            tagged_ends, ends = (
                f"{text[s.start :][:24]!r} ... {text[: s.end][-12:]!r}" for s in (tags[told.message], told)
            )
            raise UserError(
                f"messages[{told.message}]: the template's generation span is {tagged_ends}, but the reply after its "
                f"prompt is {ends}; put the tags around the reply and its stop token, or remove all tags from the "
                "template, so that replies are found by their prompts"
            )


# ───── tokens ─────


@dataclass
class _Tokens:
    ids: list[int]
    fates: list[int]
    layout: Layout
    num_before: int = 0  # tokens that begin before the layout's boundary

    def encoded(self) -> Encoded:
        return Encoded(self.ids, self.fates, len(self.layout.neutral), self.layout.thinks, self.layout.lost)


def _tokenize(tokenizer: "PreTrainedTokenizerBase", layouts: list[Layout]) -> list[_Tokens]:
    """[B] Layout to [B] _Tokens, in one tokenizer call for the pieces of all rows."""
    vocabulary = vocabulary_of(tokenizer)
    painted = [_painted(layout) for layout in layouts]
    pieces = [piece for row in painted for piece, _ in row]
    results = iter(vocabulary.tokenize(pieces))
    tokens = []
    for layout, row in zip(layouts, painted, strict=True):
        row_tokens = _Tokens([], [], layout)
        for piece, ranges in row:
            ids, num_before = next(results)
            fates = _fates(piece, ranges, ids, num_before, vocabulary)
            if piece.start < layout.boundary:
                row_tokens.num_before += num_before(layout.boundary) if num_before else len(ids)
            row_tokens.ids += ids
            row_tokens.fates += [Fate.TRAINED.value] * len(ids) if layout.trains_all else fates
        tokens.append(row_tokens)
    return tokens


def _painted(layout: Layout) -> list[tuple[TextPiece, list[tuple[int, int, Fate]]]]:
    """[(TextPiece, the ranges that overlap it)]."""
    painted, first = [], 0
    for start, end, plain in layout.pieces:
        while first < len(layout.ranges) and layout.ranges[first][1] <= start:
            first += 1
        ranges, i = [], first
        while i < len(layout.ranges) and layout.ranges[i][0] < end:
            if layout.ranges[i][1] > start:
                ranges.append(layout.ranges[i])
            i += 1
        whole = not ranges or (len(ranges) == 1 and ranges[0][0] <= start and ranges[0][1] >= end)
        offsets = not whole or start < layout.boundary < end
        before = layout.text[max(0, start - LONGEST) : start]
        painted.append((TextPiece(layout.text[start:end], start, plain, offsets, before), ranges))
    return painted


def _fates(
    piece: TextPiece,
    ranges: list[tuple[int, int, Fate]],
    ids: list[int],
    num_before: Callable[[int], int] | None,
    vocabulary: Vocabulary,
) -> list[int]:
    """A token has the fate of its first character."""
    fates = [Fate.TEMPLATE.value] * len(ids)
    for start, end, fate in ranges:
        i, j = (num_before(start), num_before(end)) if num_before else (0, len(ids))
        fates[i:j] = [fate.value] * (j - i)
        forbidden = vocabulary.special_ids if fate is Fate.SYSTEM else vocabulary.added_ids
        if fate in _OWN and not forbidden.isdisjoint(ids[i:j]):
            raise UserError(
                f"the text {piece.text[start - piece.start if start > piece.start else 0 :][:60]!r} becomes a "
                "control token of the tokenizer by its normalisation; remove the text from the row"
            )
    return fates


_OWN = (Fate.SYSTEM, Fate.USER, Fate.TOOL)


def num_common_messages(chosen: list[Message], rejected: list[Message]) -> int:
    """Number of leading messages that both sides share; at least the last message of each side is not counted.

    Args:
        chosen, rejected: As `clean_messages` gives them.
    Raises:
        UserError: They do not share the first one.
    """
    num = 0
    while num < min(len(chosen), len(rejected)) - 1 and chosen[num] == rejected[num]:
        num += 1
    if num == 0:
        raise UserError(
            "chosen and rejected do not share a first message; a pair is two full conversations with the same prompt"
        )
    return num


def _common_prompt_length(common: Conversation, rows: list[Layout]) -> int:
    """Characters of the prompt with which both renderings begin."""
    common = without_flags(common)
    prompt = replace(common, add_generation_prompt=True).text()
    if not all(len(prompt) in row.trained_starts for row in rows):
        # A side continues with a turn that is not a trained reply: the sides differ from its header on.
        prompt = common.text()
    for row in rows:
        check_prefix(row.text, prompt)
    return len(prompt)
