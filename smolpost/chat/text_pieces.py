"""Pieces of text to token ids and character offsets, with control tokens that are only text.

Two copies of a tokenizer's backend do it: one as it is, and one that matches no added token.
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
from smolpost.chat.render import Conversation
from smolpost.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_known = WeakKeyDictionary()


class TextPiece(NamedTuple):
    """A stretch of a rendering that is tokenized by itself.

    Attributes:
        text: Its characters.
        start: Its first character's place in the rendering.
        plain: True where no added token of the tokenizer may be matched.
        offsets: True where the tokens' places are needed.
    """

    text: str
    start: int
    plain: bool
    offsets: bool


def vocabulary_of(tokenizer: "PreTrainedTokenizerBase") -> "Vocabulary":
    """The `Vocabulary` of a fast tokenizer, built once as long as no token is added to it."""
    size, vocabulary = _known.get(tokenizer, (None, None))
    if size != len(tokenizer):
        vocabulary = Vocabulary(tokenizer)
        _known[tokenizer] = len(tokenizer), vocabulary
    return vocabulary


class Ranges:
    """Ranges of a text, asked whether one of them is met, in time that grows with the logarithm of their number.

    Args:
        ranges: [(start, end)] ascending by start, none of them empty; they may overlap.
    """

    def __init__(self, ranges: list[tuple[int, int]]):
        self._starts = [start for start, _ in ranges]
        self._ends = [*accumulate((end for _, end in ranges), max)]  # of a range and all before it

    def meet(self, start: int, end: int) -> bool:
        """Whether a range has a character in common with [start, end)."""
        before = bisect_left(self._starts, end)  # ranges that begin before its end
        return start < end and before > 0 and self._ends[before - 1] > start


class Vocabulary:
    """Added tokens of a tokenizer, and how text is tokenized with and without them.

    Attributes:
        added: Matches any added token in text, white space apart: runs of blanks are no control tokens.
        special: Matches the added tokens that are special.
        added_ids, special_ids: Their ids, the unknown token's left out.
        stops: The added tokens' texts that may end a turn: those that are no structure of a reply. Longest first.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._backend = tokenizer.backend_tokenizer
        tokens = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
        texts = sorted((token.content for token in tokens.values()), key=len, reverse=True)
        self.stops = [text for text in texts if text not in STRUCTURE]
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
            [P] (ids, num_before): num_before(place) is how many of the tokens begin before a place in the rendering;
            None where not asked for.
        """
        results = [None] * len(pieces)
        for plain in (False, True):
            backend = self._plain if plain else self._usual
            chosen = [i for i, piece in enumerate(pieces) if piece.plain == plain and piece.text != "\n"]
            encodings = backend.encode_batch_fast([pieces[i].text for i in chosen], add_special_tokens=False)
            for i, encoding in zip(chosen, encodings, strict=True):
                ids = encoding.ids
                results[i] = ids, self._counter(backend, pieces[i], ids) if pieces[i].offsets else None
        # What follows the last reply of every row: tokenized once, and given out as lists of their own.
        return [(list(self._line_break), None) if result is None else result for result in results]

    @cached_property
    def _line_break(self) -> list[int]:
        return self._usual.encode("\n", add_special_tokens=False).ids

    def _counter(self, backend: Tokenizer, piece: TextPiece, ids: list[int]) -> Callable[[int], int]:
        """num_before of a piece: by the tokens' bytes where they are the text's, else by the tokenizer's offsets."""
        if self._num_bytes is not None:
            ends = self._num_bytes[ids].cumsum()
            if ends[-1] == len(piece.text.encode()):
                return _ByteCounter(piece, ends)
        starts = [start for start, _ in backend.encode(piece.text, add_special_tokens=False).offsets]
        return partial(_num_before, piece, starts)

    @cached_property
    def _num_bytes(self) -> np.ndarray | None:
        """[ids] int64 bytes that each token of a byte-level vocabulary stands for; None for other vocabularies."""
        added = self._backend.get_added_tokens_decoder()
        tokens = {i: token for token, i in self._backend.get_vocab(with_added_tokens=False).items() if i not in added}
        if not set(ByteLevel.alphabet()).issuperset("".join(tokens.values())):
            return None
        sizes = np.zeros(max([*tokens, *added]) + 1, np.int64)
        for i, token in tokens.items():
            sizes[i] = len(token)  # a character of the vocabulary for each byte
        for i, token in added.items():
            sizes[i] = len(token.content.encode())
        return sizes

    def cut(self, text: str, edges: list[int], neutral: list[tuple[int, int]]) -> list[tuple[int, int, bool]]:
        """[(start, end, plain)]: the text cut at the edges, and around control tokens that are only text.

        Such a string is tokenized with the text around it, up to the next token that is one: what the tokenizer would
        do if it did not know the string.

        Args:
            text: A rendering.
            edges: Ascending places where a piece ends and the next begins.
            neutral: [(start, end)] of the strings, ascending.
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
    """Tokens of a piece that begin before a place in the rendering."""
    return bisect_left(starts, place - piece.start)


class _ByteCounter:
    """The same from where each token ends, in bytes: tracking offsets doubles the time of tokenizing.

    Places are mostly asked in ascending order, so each count of bytes goes on from the one before.
    """

    def __init__(self, piece: TextPiece, ends: np.ndarray):
        self._piece, self._starts = piece, ends[:-1]  # a token begins where the one before it ends, the first one at 0
        self._place = self._num_bytes = 0

    def __call__(self, place: int) -> int:
        place = min(max(place - self._piece.start, 0), len(self._piece.text))
        if place < self._place:
            self._place = self._num_bytes = 0
        self._num_bytes += len(self._piece.text[self._place : place].encode())
        self._place = place
        return int(np.searchsorted(self._starts, self._num_bytes)) + 1 if place else 0


def check_encodable(text: str, conversation: Conversation) -> None:
    """Refuse half surrogate pairs, which have no UTF-8 and so no tokens.

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
            f"{where} holds {half}, half of a surrogate pair, which the tokenizer cannot encode; "
            "remove it or write the whole character"
        ) from error


def _holds_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return any(_holds_surrogate(part) for pair in value.items() for part in pair)
    return isinstance(value, list | tuple) and any(map(_holds_surrogate, value))


def _matcher(tokens: list[str]) -> re.Pattern[str]:
    """Leftmost, longest match of one of the tokens, as tokenizers match them; of nothing where there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if tokens else r"(?!)")
