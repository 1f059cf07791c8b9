"""Pieces of text to token ids and character offsets, with control tokens that are only text.

Two copies of a tokenizer's backend do this: one unchanged, and one that does not match added tokens.
"""

import re
from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from smolpost.chat.controls import STRUCTURE
from smolpost.chat.leading_blank import LeadingBlank, leading_blank
from smolpost.chat.render import Conversation
from smolpost.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 64  # characters of a control token that is looked for before a piece, at most
_known = WeakKeyDictionary()


class TextPiece(NamedTuple):
    """A part of a rendering that is tokenized separately.

    Attributes:
        text: Its characters.
        start: Position of its first character in the rendering.
        plain: Added tokens of the tokenizer must not be matched.
        offsets: The positions of the tokens are needed.
        before: The end of the text that precedes it, at most LONGEST characters.
    """

    text: str
    start: int
    plain: bool
    offsets: bool
    before: str = ""


def vocabulary_of(tokenizer: "PreTrainedTokenizerBase") -> "Vocabulary":
    """The `Vocabulary` of a fast tokenizer; built again only when tokens were added to the tokenizer."""
    size, vocabulary = _known.get(tokenizer, (None, None))
    if size != len(tokenizer):
        vocabulary = Vocabulary(tokenizer)
        _known[tokenizer] = len(tokenizer), vocabulary
    return vocabulary


class Ranges:
    """Ranges of a text that answer in logarithmic time whether one of them overlaps another range.

    Args:
        ranges: [(start, end)] ascending by start, not empty; they may overlap.
    """

    def __init__(self, ranges: list[tuple[int, int]]):
        self._starts = [start for start, _ in ranges]
        self._ends = [*accumulate((end for _, end in ranges), max)]  # largest end of a range and all before it

    def meet(self, start: int, end: int) -> bool:
        """Whether a range has a character in common with [start, end)."""
        before = bisect_left(self._starts, end)  # ranges that begin before its end
        return start < end and before > 0 and self._ends[before - 1] > start


class Vocabulary:
    """Added tokens of a tokenizer, and how text is tokenized with and without them.

    Attributes:
        added: Matches any added token in text, except white space: runs of blanks are not control tokens.
        special: Matches the added tokens that are special.
        added_ids, special_ids: Their ids, without the unknown token's.
        stops: Texts of the added tokens that may end a turn, which are all but a reply's structure. Longest first.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._backend = tokenizer.backend_tokenizer
        tokens = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
        texts = sorted((token.content for token in tokens.values()), key=len, reverse=True)
        self.stops = [text for text in texts if text not in STRUCTURE]
        self._texts = tuple(texts)
        self.added = _matcher(texts)
        self.special = _matcher([token.content for token in tokens.values() if token.special])
        self.added_ids = set(tokens) - {tokenizer.unk_token_id}
        self.special_ids = {i for i, token in tokens.items() if token.special} - {tokenizer.unk_token_id}

    @cached_property
    def _usual(self) -> Tokenizer:
        copy = Tokenizer.from_str(self._backend.to_str())
        # Post-processors move the offsets of blanks; with add_special_tokens=False they do nothing else.
        copy.post_processor = None
        copy.no_padding()
        copy.no_truncation()
        return copy

    @cached_property
    def _plain(self) -> Tokenizer:
        copy = Tokenizer.from_str(self._usual.to_str())
        tokens = copy.get_added_tokens_decoder().values()
        copy.add_special_tokens([AddedToken(t.content, special=True, normalized=t.normalized) for t in tokens])
        copy.encode_special_tokens = True
        return copy

    def tokenize(self, pieces: list[TextPiece]) -> list[tuple[list[int], Callable[[int], int] | None]]:
        """Token ids of pieces.

        Args:
            pieces: [P] TextPiece.
        Returns:
            [P] (ids, num_before). num_before(place) is the number of the piece's tokens that begin before a place in
            the rendering; None if the piece does not need offsets.
        """
        results = [None] * len(pieces)
        if self._blank is not None:
            results = [self._joined(piece) if piece.start else None for piece in pieces]
        for plain in (False, True):
            backend = self._plain if plain else self._usual
            chosen = [i for i, p in enumerate(pieces) if results[i] is None and p.plain == plain and p.text != "\n"]
            encodings = backend.encode_batch_fast([pieces[i].text for i in chosen], add_special_tokens=False)
            for i, encoding in zip(chosen, encodings, strict=True):
                ids = encoding.ids
                results[i] = ids, self._counter(backend, pieces[i], ids) if pieces[i].offsets else None
        # Every row ends with a line break after its last reply. It is tokenized once; each row gets its own list.
        return [(list(self._line_break), None) if result is None else result for result in results]

    @cached_property
    def _blank(self) -> LeadingBlank | None:
        """None for a tokenizer that puts no blank before a text."""
        return leading_blank(self._usual, self._plain)

    def _joined(self, piece: TextPiece) -> tuple[list[int], Callable[[int], int]]:
        """A piece that is not the first one, as if the text before it were tokenized with it: without a leading blank.

        Only what precedes its first control token depends on the text before. Directly after a control token, a
        tokenizer that puts a blank before every text puts one here.
        """
        usual = self._plain if piece.plain else self._usual
        match = None if piece.plain else self.added.search(piece.text)
        place = match.start() if match else len(piece.text)
        if self._blank.everywhere and piece.before.endswith(self._texts):
            place = 0
        without = self._blank.plain if piece.plain else self._blank.usual
        head, tail = without.encode(piece.text[:place]), usual.encode(piece.text[place:], add_special_tokens=False)
        starts = [start for start, _ in head.offsets] + [place + start for start, _ in tail.offsets]
        return head.ids + tail.ids, partial(_num_before, piece, starts)

    @cached_property
    def _line_break(self) -> list[int]:
        return self._usual.encode("\n", add_special_tokens=False).ids

    def _counter(self, backend: Tokenizer, piece: TextPiece, ids: list[int]) -> Callable[[int], int]:
        """num_before of a piece: from the tokens' bytes if they add up to the text, else from their offsets."""
        if self._num_bytes is not None:
            ends = self._num_bytes[ids].cumsum()
            if ends[-1] == len(piece.text.encode()):
                return _ByteCounter(piece, ends)
        starts = [start for start, _ in backend.encode(piece.text, add_special_tokens=False).offsets]
        return partial(_num_before, piece, starts)

    @cached_property
    def _num_bytes(self) -> np.ndarray | None:
        """[ids] int64, bytes of each token of a byte-level vocabulary; None for other vocabularies."""
        added = self._backend.get_added_tokens_decoder()
        tokens = {i: token for token, i in self._backend.get_vocab(with_added_tokens=False).items() if i not in added}
        if not set(ByteLevel.alphabet()).issuperset("".join(tokens.values())):
            return None
        sizes = np.zeros(max([*tokens, *added]) + 1, np.int64)
        for i, token in tokens.items():
            sizes[i] = len(token)  # one character of the vocabulary for each byte
        for i, token in added.items():
            sizes[i] = len(token.content.encode())
        return sizes

    def cut(self, text: str, edges: list[int], neutral: list[tuple[int, int]]) -> list[tuple[int, int, bool]]:
        """The text cut into pieces at the edges, and around control tokens that are only text.

        A control token that is only text is tokenized together with the text around it, up to the next real control
        token, as if the tokenizer did not know it.

        Args:
            text: A rendering.
            edges: Ascending positions at which a piece ends and the next one begins.
            neutral: [(start, end)] of the control tokens that are only text, ascending.
        Returns:
            [(start, end, plain)], ascending; plain as in `TextPiece`.
        """
        pieces, only_text = [], Ranges(neutral)
        for start, end in pairwise(sorted({0, *edges, len(text)})):
            if not only_text.meet(start, end):
                pieces.append((start, end, False))
                continue
            done = start
            for match in self.added.finditer(text, start, end):
                a, b = match.span()
                if not only_text.meet(a, b):
                    pieces += [(done, a, only_text.meet(done, a)), (a, b, False)]
                    done = b
            pieces.append((done, end, only_text.meet(done, end)))
        return [piece for piece in pieces if piece[0] < piece[1]]


def _num_before(piece: TextPiece, starts: list[int], place: int) -> int:
    """Number of tokens of a piece that begin before a place in the rendering."""
    return bisect_left(starts, place - piece.start)


class _ByteCounter:
    """The same number, from the ends of the tokens in bytes: tracking offsets would double the time of tokenizing.

    Places mostly come in ascending order, so each count of bytes continues from the previous one.
    """

    def __init__(self, piece: TextPiece, ends: np.ndarray):
        self._piece, self._starts = piece, ends[:-1]  # a token begins at the end of the previous one, the first at 0
        self._place = self._num_bytes = 0

    def __call__(self, place: int) -> int:
        place = min(max(place - self._piece.start, 0), len(self._piece.text))
        if place < self._place:
            self._place = self._num_bytes = 0
        self._num_bytes += len(self._piece.text[self._place : place].encode())
        self._place = place
        return int(np.searchsorted(self._starts, self._num_bytes)) + 1 if place else 0


def check_encodable(text: str, conversation: Conversation) -> None:
    """Refuse halves of surrogate pairs, which UTF-8 and so the tokenizer cannot encode.

    Raises:
        UserError: Names the message, or the template's variable.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        places = {f"messages[{i}]": message for i, message in enumerate(conversation.messages)}
        places |= {
            "tools": conversation.tools,
            **{f"chat_template_kwargs.{k}": v for k, v in conversation.variables.items()},
        }
        where = next((place for place, value in places.items() if _holds_surrogate(value)), "the chat template's text")
        raise UserError(
            f"{where} has {half}, half of a surrogate pair, which the tokenizer cannot encode; "
            "remove it or write the complete character"
        ) from error


def _holds_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return any(_holds_surrogate(part) for pair in value.items() for part in pair)
    return isinstance(value, list | tuple) and any(map(_holds_surrogate, value))


def _matcher(tokens: list[str]) -> re.Pattern[str]:
    """Matches the leftmost and longest of the tokens, as tokenizers do; matches nothing without tokens."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if tokens else r"(?!)")
