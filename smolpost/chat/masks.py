"""Conversations to token ids with the fate of every token: trained where a policy trains it, else the reason.

Text is cut at the edges of the replies and each piece is tokenized by itself. No token straddles an edge, and the ids
are those of inference: a tokenized prompt, then the reply. What trains changes no id.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import NamedTuple

from smolpost.chat.contents import locate
from smolpost.chat.fates import Fate
from smolpost.chat.pieces import Piece, Ranges, check_encodable, vocabulary_of
from smolpost.chat.reasoning import reasoning_ranges, split_reasoning
from smolpost.chat.render import RESULT_ROLES, clean_messages, conversation_of, text_of
from smolpost.chat.shown import Loss, losses
from smolpost.chat.spans import (
    EndlessTurn,
    assistant_turns,
    check_prefix,
    check_stop,
    differ,
    generation_spans,
    prefix_spans,
    turn_end,
)
from smolpost.errors import UserError

ROLES = ("system", "user", "assistant", "tool", "all")


@dataclass(frozen=True)
class Policy:
    """What trains.

    Attributes:
        roles: Whose turns, each from the first character after its header up to and including its stop token; of
            system, user, assistant and tool. A message with `train: false` (or `training: false`) is left out. With
            all, every token trains, the template's too.
        reasoning: False leaves out the non-empty think blocks of replies, tags included, and trains what follows.
        last_turn_only: Only the last turn that would train.
    Raises:
        UserError: A role is unknown.
    """

    roles: tuple[str, ...] = ("assistant",)
    reasoning: bool = True
    last_turn_only: bool = False

    def __post_init__(self):
        for role in self.roles:
            if role not in ROLES:
                raise UserError(f"role {role!r} cannot be trained; use {', '.join(ROLES)}")

    def turns(self, messages):
        """Indices of the messages that train."""
        chosen = [i for i, m in enumerate(messages) if _role(m) in self.roles and not _left_out(m)]
        return chosen[-1:] if self.last_turn_only else chosen


class Encoded(NamedTuple):
    """A tokenized conversation.

    Attributes:
        input_ids: [L] token ids.
        fates: [L] `Fate` of each token; FIRST is for who lays out the documents.
        neutralised: Number of control tokens in the row's own texts that became plain text.
        thinks: Whether reasoning trains: a reply's think block with something in it, by its text.
        lost: What the template leaves out of the conversation.
    """

    input_ids: list[int]
    fates: list[int]
    neutralised: int
    thinks: bool = False
    lost: tuple[Loss, ...] = ()


class EncodedPair(NamedTuple):
    """A tokenized preference pair; each side is the prompt followed by its completion.

    Attributes:
        prompt_ids: [P] token ids both sides share.
        chosen_ids: [C] token ids, ending with the stop token (rejected_ids: [R], alike).
        rejected_ids: See chosen_ids.
        prompt_fates: [P] `Fate` of each token; nothing in the prompt is trained.
        chosen_fates: [C] `Fate`: a completion of several turns also holds user and tool turns.
        rejected_fates: [R] See chosen_fates.
        neutralised: As `Encoded`; those of the prompt count once.
        thinks: As `Encoded`, of the chosen side.
        lost: As `Encoded`, of both sides.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_fates: list[int]
    chosen_fates: list[int]
    rejected_fates: list[int]
    neutralised: int
    thinks: bool
    lost: tuple[Loss, ...]


def encode(tokenizer, messages, *, template_kwargs=None, tools=None, today, policy=Policy()):
    """Tokenize one conversation.

    Args:
        tokenizer: A fast tokenizer with a chat template, with or without {% generation %} tags.
        messages, template_kwargs, tools, today: As `smolpost.chat.render.render`.
        policy: What trains; the ids are the same under each.
    Returns:
        Encoded.
    Raises:
        UserError: The template refuses the messages, or does not tell where a turn that trains begins and ends.
    """
    conversation = conversation_of(tokenizer, messages, template_kwargs, tools, today)
    return _tokenize(tokenizer, [_layout(tokenizer, conversation, policy)])[0].encoded()


def encode_batch(tokenizer, conversations, *, template_kwargs=None, tools=None, today, policy=Policy()):
    """`encode` for many conversations in one call of the fast tokenizer.

    Args:
        conversations: [B] lists of messages.
        template_kwargs: [B] dicts or None, or None for all.
        tools: [B] lists or None, or None for all.
        today, policy: As `encode`, for all.
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
            rows.append(_layout(tokenizer, conversation, policy))
        except UserError as error:
            raise UserError(f"rows[{i}]: {error}") from error
    return [tokens.encoded() for tokens in _tokenize(tokenizer, rows)]


def encode_pair(tokenizer, chosen, rejected, *, template_kwargs=None, tools=None, today, policy=Policy()):
    """Tokenize a preference pair given as two full conversations.

    The prompt is the longest common prefix of messages, with the generation prompt where both continue with a trained
    reply. Prompt and completion together are `encode` of the conversation up to its trailing line break.

    Args:
        tokenizer, template_kwargs, tools, today: As `encode`.
        chosen, rejected: Messages. Where one side is a prefix of the other, its last message is its completion.
        policy: What is scored of each completion.
    Returns:
        EncodedPair.
    Raises:
        UserError: As `encode`, or the sides share no message, or the template rewrites earlier turns.
    """
    chosen, rejected = clean_messages(chosen), clean_messages(rejected)
    num_common = _num_common(chosen, rejected)
    sides = [conversation_of(tokenizer, side, template_kwargs, tools, today) for side in (chosen, rejected)]
    rows = [_layout(tokenizer, side, policy, first=num_common, trim=True) for side in sides]
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


def encode_prompt(tokenizer, messages, *, template_kwargs=None, tools=None, today):
    """The ids of a conversation up to where its next reply begins: what precedes that reply in training.

    Args, Raises: As `encode`.
    """
    conversation = conversation_of(tokenizer, messages, template_kwargs, tools, today, add_generation_prompt=True)
    return _tokenize(tokenizer, [_layout(tokenizer, conversation, Policy(roles=()))])[0].ids


def trained_by_prefixes(tokenizer, messages, *, template_kwargs=None, tools=None, today, policy=Policy()):
    """`encode` by differences of renderings alone, whatever the template's {% generation %} tags say.

    Raises:
        UserError: As `encode`, or the template rewrites earlier turns.
    """
    conversation = conversation_of(tokenizer, messages, template_kwargs, tools, today)
    return _tokenize(tokenizer, [_layout(tokenizer, conversation, policy, by_prefixes=True)])[0].encoded()


def check_spans(tokenizer, messages, *, template_kwargs=None, tools=None, today):
    """Refuse a template whose {% generation %} tags mark something else than the replies after their prompts.

    Replies whose prompts do not tell where they stand, as the template rewrites earlier turns, are left to the tags.

    Raises:
        UserError: Names the first reply that differs by more than white space; or as `encode`.
    """
    conversation = _without_flags(conversation_of(tokenizer, messages, template_kwargs, tools, today))
    text, marked = conversation.render()
    stops = vocabulary_of(tokenizer).stops
    tagged = generation_spans(conversation, text, marked, stops)
    if not _one_each(tagged, conversation):
        return  # nobody goes by the tags
    tags = {span.message: span for span in tagged}
    for told in prefix_spans(conversation, text, stops)[0]:
        if differ(text, told, tags[told.message]):
            tagged_ends, ends = (
                f"{text[s.start :][:24]!r} ... {text[: s.end][-12:]!r}" for s in (tags[told.message], told)
            )
            raise UserError(
                f"messages[{told.message}]: the template's generation span is {tagged_ends}, but the reply after its "
                f"prompt is {ends}; put the tags around the reply and its stop token, or take all of them out of the "
                "template, and replies are found by their prompts"
            )


# ───── layout: where a rendering is cut, and the fate of its characters ─────


@dataclass(frozen=True)
class _Layout:
    text: str
    pieces: list  # [(start, end, plain)]
    ranges: list  # [(start, end, fate)], ascending; a later one paints over an earlier one
    neutral: list
    trained_starts: frozenset
    thinks: bool
    lost: tuple
    trains_all: bool
    boundary: int = 0


def _layout(tokenizer, conversation, policy, *, first=0, trim=False, by_prefixes=False):
    """Args beyond `encode`: first: index of the first message that may train; trim: drop trailing line breaks."""
    flagged, conversation = conversation.messages, _without_flags(conversation)
    vocabulary = vocabulary_of(tokenizer)
    text, marked = conversation.render()
    check_encodable(text, conversation)
    spans, unknown = generation_spans(conversation, text, marked, vocabulary.stops), {}
    if by_prefixes or not _one_each(spans, conversation):
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
    lost = losses(conversation, text, spans, replies)
    return _Layout(text, vocabulary.cut(text, edges, neutral), ranges, neutral, starts, thinks, lost, trains_all)


def _one_each(spans, conversation):
    return conversation.marks_spans and all(span.message is not None for span in spans)


def _turn(conversation, text, contents, i, vocabulary):
    """(start, end) of a turn that is no reply: its text up to and including its stop token, or that alone."""
    start = next((content.start for content in contents or [] if content.message == i), None)
    is_empty = not text_of(conversation.messages[i].get("content")).strip()
    if start is None and not is_empty:
        raise UserError(
            f"messages[{i}]: the chat template does not show the text of this {_role(conversation.messages[i])} turn "
            "as it is, so where it begins cannot be told; take the role out of what trains, or use another template"
        )
    end = turn_end(conversation, text, i, vocabulary.stops)
    if start is None:
        start = end - len(next(stop for stop in vocabulary.stops if text.endswith(stop, 0, end)))
    return start, end


def _search_reply(conversation, text, i):
    """A reply the template shows differently later on: its answer where that stands once, else nothing."""
    answer = split_reasoning(text_of(conversation.messages[i].get("content")))[1].strip()
    start = text.find(answer)
    once = answer and start >= 0 and text.find(answer, start + 1) < 0
    return (start, start + len(answer)) if once else (0, 0)


def _inner_stops(text, span, vocabulary, eos, only_text):
    """Stop tokens inside a reply that came about in rendering: only the last one ends it."""
    stop = eos if eos and text.endswith(eos, 0, span.end) else None
    stop = stop or next((s for s in vocabulary.stops if text.endswith(s, 0, span.end)), None)
    found, place = [], text.find(stop, span.start, span.end - len(stop)) if stop else -1
    while place >= 0:
        if not only_text.meet(place, place + len(stop)):
            found.append((place, place + len(stop)))
        place = text.find(stop, place + len(stop), span.end - len(stop))
    return found


def _reasoning(text, span, vocabulary, words):
    """Where the reasoning of a reply stands, by its text: tokenizers may know the tags or spell them out. What length
    cut takes the stop token with it.

    Args:
        words: [(start, end)] of the control tokens that are only text, ascending.
    """
    stop = next((stop for stop in vocabulary.stops if text.endswith(stop, 0, span.end)), "")
    end = max(span.start, span.end - len(stop))
    body, done = [], span.start
    for a, b in words[bisect_left(words, (span.start,)) : bisect_left(words, (end,))]:
        body += [text[done:a], "\0" * (b - a)]  # a word about the tags is not one of them
        done = b
    ranges = reasoning_ranges("".join([*body, text[done:end]]))
    return [(span.start + a, span.end if span.start + b == end else span.start + b) for a, b in ranges]


def _without_flags(conversation):
    """Without train and training: templates then mark each reply, and the policy decides."""
    flags = ("train", "training")
    if not any(flag in message for message in conversation.messages for flag in flags):
        return conversation
    messages = [{key: value for key, value in m.items() if key not in flags} for m in conversation.messages]
    return replace(conversation, messages=messages)


def _left_out(message):
    return message.get("train") is False or message.get("training") is False


def _role(message):
    return "tool" if message.get("role") in RESULT_ROLES else message.get("role")


# ───── tokens ─────


@dataclass
class _Tokens:
    ids: list
    fates: list
    layout: _Layout
    num_before: int = 0  # tokens that begin before the layout's boundary

    def encoded(self):
        return Encoded(self.ids, self.fates, len(self.layout.neutral), self.layout.thinks, self.layout.lost)


def _tokenize(tokenizer, layouts):
    """One tokenizer call for the pieces of all rows: [B] _Layout to [B] _Tokens."""
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


def _painted(layout):
    """[(Piece, the ranges that reach into it)]."""
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
        painted.append((Piece(layout.text[start:end], start, plain, offsets), ranges))
    return painted


def _fates(piece, ranges, ids, num_before, vocabulary):
    """A token has the fate of its first character."""
    fates = [Fate.TEMPLATE.value] * len(ids)
    for start, end, fate in ranges:
        i, j = (num_before(start), num_before(end)) if num_before else (0, len(ids))
        fates[i:j] = [fate.value] * (j - i)
        forbidden = vocabulary.special_ids if fate is Fate.SYSTEM else vocabulary.added_ids
        if fate in _OWN and not forbidden.isdisjoint(ids[i:j]):
            raise UserError(
                f"the text {piece.text[start - piece.start if start > piece.start else 0 :][:60]!r} comes out as a "
                "control token of the tokenizer, which its normalisation makes of it; take it out of the row"
            )
    return fates


_OWN = (Fate.SYSTEM, Fate.USER, Fate.TOOL)


def _num_common(chosen, rejected):
    """Number of leading messages both sides share, leaving each at least its last message."""
    num = 0
    while num < min(len(chosen), len(rejected)) - 1 and chosen[num] == rejected[num]:
        num += 1
    if num == 0:
        raise UserError(
            "chosen and rejected share no first message; a pair is two full conversations that begin with one prompt"
        )
    return num


def _common_prompt_length(common, rows):
    """Length in characters of the prompt that both renderings begin with."""
    common = _without_flags(common)
    prompt = replace(common, add_generation_prompt=True).text()
    if not all(len(prompt) in row.trained_starts for row in rows):
        # A side continues with a user, a tool or an untrained turn: the sides part before its header.
        prompt = common.text()
    for row in rows:
        check_prefix(row.text, prompt)
    return len(prompt)
