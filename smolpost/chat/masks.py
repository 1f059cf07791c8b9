"""Conversations to token ids with a policy-first mask: True where the policy produced the token.

Text is cut at the edges of the trained spans and each piece is tokenized by itself. No token straddles an edge, and
the ids are those of inference: a tokenized prompt, then the reply.
"""

from typing import NamedTuple

from smolpost.chat.render import clean_messages, render, render_spans
from smolpost.errors import UserError


class Encoded(NamedTuple):
    """A tokenized conversation.

    Attributes:
        input_ids: [L] token ids.
        trained: [L] True for the policy's tokens: assistant replies up to and including the stop token.
    """

    input_ids: list[int]
    trained: list[bool]


class EncodedPair(NamedTuple):
    """A tokenized preference pair; each side is the prompt followed by its completion.

    Attributes:
        prompt_ids: [P] token ids both sides share.
        chosen_ids: [C] token ids, ending with the stop token (rejected_ids: [R], alike).
        rejected_ids: See chosen_ids.
        chosen_trained: [C] True for the policy's tokens: a completion of several turns also holds user and tool turns.
        rejected_trained: [R] See chosen_trained.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_trained: list[bool]
    rejected_trained: list[bool]


def encode(tokenizer, messages, *, template_kwargs=None, tools=None, today, last_turn_only=False):
    """Tokenize one conversation.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        messages, template_kwargs, tools, today: As `smolpost.chat.render.render`.
        last_turn_only: Train the last trained reply only; the ids stay the same.
    Returns:
        Encoded.
    Raises:
        UserError: The template refuses the messages.
    """
    segments = _rendered(tokenizer, messages, template_kwargs, tools, today, last_turn_only)
    return _tokenize(tokenizer, [segments])[0]


def encode_batch(tokenizer, conversations, *, template_kwargs=None, tools=None, today, last_turn_only=False):
    """`encode` for many conversations in one call of the fast tokenizer.

    Args:
        conversations: [B] lists of messages.
        template_kwargs: [B] dicts or None, or None for all.
        tools: [B] lists or None, or None for all.
        today, last_turn_only: As `encode`, for all.
    Returns:
        [B] Encoded.
    Raises:
        UserError: The template refuses a row; the text begins with `rows[i]: `.
        ValueError: The lists differ in length.
    """
    rows = []
    no_values = [None] * len(conversations)
    columns = zip(conversations, template_kwargs or no_values, tools or no_values, strict=True)
    for i, (messages, kwargs, row_tools) in enumerate(columns):
        try:
            rows.append(_rendered(tokenizer, messages, kwargs, row_tools, today, last_turn_only))
        except UserError as error:
            raise UserError(f"rows[{i}]: {error}") from error
    return _tokenize(tokenizer, rows)


def encode_pair(tokenizer, chosen, rejected, *, template_kwargs=None, tools=None, today):
    """Tokenize a preference pair given as two full conversations.

    The prompt is the longest common prefix of messages, with the generation prompt where both continue with a trained
    reply. Prompt and completion together are `encode` of the conversation up to its trailing line break.

    Args:
        tokenizer, template_kwargs, tools, today: As `encode`.
        chosen, rejected: Messages. Where one side is a prefix of the other, its last message is its completion.
    Returns:
        EncodedPair.
    Raises:
        UserError: The sides share no message, or the template rewrites earlier turns.
    """
    options = {"template_kwargs": template_kwargs, "tools": tools, "today": today}
    chosen, rejected = clean_messages(chosen), clean_messages(rejected)
    sides = [render_spans(tokenizer, messages, **options) for messages in (chosen, rejected)]
    boundary = _common_prompt_length(tokenizer, chosen[: _num_common(chosen, rejected)], sides, options)
    text, spans = sides[0]
    rows = [_segments(text[:boundary], [span for span in spans if span[1] <= boundary])]
    for text, spans in sides:
        completion = text[boundary:].rstrip("\n")
        rows.append(_segments(completion, [(a - boundary, b - boundary) for a, b in spans if a >= boundary]))
    prompt, chosen_completion, rejected_completion = _tokenize(tokenizer, rows)
    return EncodedPair(
        prompt.input_ids,
        chosen_completion.input_ids,
        rejected_completion.input_ids,
        chosen_completion.trained,
        rejected_completion.trained,
    )


def trained_by_prefixes(tokenizer, messages, *, template_kwargs=None, tools=None, today):
    """`encode`, derived without generation spans, to check them.

    A reply is what a conversation's rendering gains over the generation prompt of the messages before it.

    Raises:
        UserError: As `encode`, or the template rewrites earlier turns.
    """
    options = {"template_kwargs": template_kwargs, "tools": tools, "today": today}
    text = render(tokenizer, messages, **options)
    ids, trained, done = [], [], 0

    def take(end, is_reply):
        piece = tokenizer.encode(text[done:end], add_special_tokens=False)
        ids.extend(piece)
        trained.extend([is_reply] * len(piece))
        return end

    for i, message in enumerate(messages):
        if message["role"] != "assistant" or False in (message.get("train"), message.get("training")):
            continue
        before = render(tokenizer, messages[:i], **options, add_generation_prompt=True)
        after = render(tokenizer, messages[: i + 1], **options)
        _check_prefix(text, before)
        _check_prefix(text, after)
        done = take(len(before), False)
        done = take(len(after.removesuffix("\n")), True)
    take(len(text), False)
    return Encoded(ids, trained)


def _rendered(tokenizer, messages, template_kwargs, tools, today, last_turn_only):
    text, spans = render_spans(tokenizer, messages, template_kwargs=template_kwargs, tools=tools, today=today)
    segments = _segments(text, spans)
    return _only_last_trained(segments) if last_turn_only else segments


def _segments(text, spans):
    """[(piece, trained)]: the text cut at the edges of the spans, without empty pieces."""
    pieces, done = [], 0
    for start, end in spans:
        pieces += [(text[done:start], False), (text[start:end], True)]
        done = end
    pieces.append((text[done:], False))
    return [piece for piece in pieces if piece[0]]


def _only_last_trained(segments):
    last = max((i for i, (_, trained) in enumerate(segments) if trained), default=None)
    return [(piece, i == last) for i, (piece, _) in enumerate(segments)]


def _tokenize(tokenizer, rows):
    """One tokenizer call for the pieces of all rows: [B] lists of (piece, trained) to [B] Encoded."""
    pieces = [piece for row in rows for piece, _ in row]
    # verbose=False: rows longer than model_max_length are the packer's business, not a warning.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    ids = iter(tokenizer(pieces, **options)["input_ids"] if pieces else ())
    encoded = []
    for row in rows:
        row_ids, trained = [], []
        for _, is_trained in row:
            piece_ids = next(ids)
            row_ids += piece_ids
            trained += [is_trained] * len(piece_ids)
        encoded.append(Encoded(row_ids, trained))
    return encoded


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


def _common_prompt_length(tokenizer, common, sides, options):
    """Length in characters of the prompt that both renderings begin with."""
    prompt = render(tokenizer, common, **options, add_generation_prompt=True)
    if not all(any(start == len(prompt) for start, _ in spans) for _, spans in sides):
        # A side continues with a user, a tool or an untrained turn: the sides part before its header.
        prompt = render(tokenizer, common, **options)
    for text, _ in sides:
        _check_prefix(text, prompt)
    return len(prompt)


def _check_prefix(text, prefix):
    if not text.startswith(prefix):
        raise UserError(
            "the chat template renders earlier turns differently once later ones follow; "
            "use one whose renderings extend each other, such as smollm3"
        )
