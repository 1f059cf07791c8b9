"""What a prepared folder consists of: rows, packs and their documents, pairs, completions.

T tokens of a document or part.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smolpost.chat.fates import Fate


@dataclass(frozen=True)
class PreparedRow:
    """A row as it was read.

    Attributes:
        number: Number of the row in its path, from 1.
        tokens: Its number of tokens, truncated ones included.
        think: It trains a think block.
        dropped: The reason, or "" if it was kept.
    """

    source: str
    path: str
    number: int
    tokens: int
    think: bool
    dropped: str

    @property
    def place(self) -> str:
        """PATH:NUMBER, for messages."""
        return f"{self.path}:{self.number}"


@dataclass(frozen=True)
class TokenSequence:
    """A document of a pack, or a part of a pair or completion.

    Attributes:
        name: "document", "prompt", "chosen", "rejected" or "completion".
        first_position: Position of the first token: 0, except in completions, which continue their prompt.
        ids: [T] int32.
        fates: [T] int8, values of Fate.
    """

    name: str
    first_position: int
    ids: np.ndarray
    fates: np.ndarray

    @property
    def positions(self) -> np.ndarray:
        """[T] as the model gets them."""
        return self.first_position + np.arange(len(self.ids))

    def runs(self) -> list[tuple[Fate, int, int]]:
        """(fate, start, stop) of the runs of equal fate, in order."""
        edges = np.flatnonzero(np.diff(self.fates)) + 1
        starts, stops = [0, *edges.tolist()], [*edges.tolist(), len(self.fates)]
        return [(Fate(self.fates[a]), a, b) for a, b in zip(starts, stops, strict=True) if a < b]


@dataclass(frozen=True)
class PackedDocument:
    """A document of a pack.

    Attributes:
        pack, index: Number of the pack in the folder and of the document in the pack, from 0.
        start: Index of its first token in the pack.
    """

    pack: int
    index: int
    start: int
    row: PreparedRow
    tokens: TokenSequence


@dataclass(frozen=True)
class Pack:
    """A pack and its documents, in order."""

    index: int
    documents: list[PackedDocument]

    @property
    def num_tokens(self) -> int:
        return sum(len(document.tokens.ids) for document in self.documents)


@dataclass(frozen=True)
class PreparedPair:
    """`prompt | chosen` and `prompt | rejected`; scored tokens of the prompt count for both sides."""

    index: int
    row: PreparedRow
    prompt: TokenSequence
    chosen: TokenSequence
    rejected: TokenSequence

    @property
    def parts(self) -> tuple[TokenSequence, TokenSequence, TokenSequence]:
        return self.prompt, self.chosen, self.rejected


@dataclass(frozen=True)
class PreparedCompletion:
    """`prompt | completion`.

    Attributes:
        label: Whether the completion is desired; None in a folder without labels.
    """

    index: int
    row: PreparedRow
    label: bool | None
    prompt: TokenSequence
    completion: TokenSequence

    @property
    def parts(self) -> tuple[TokenSequence, TokenSequence]:
        return self.prompt, self.completion


class Location(NamedTuple):
    """Where a row is in the packs, pairs or completions.

    Attributes:
        pack, document: Number of the pack and of its document, from 0; of a pair or completion, its number and 0.
        row: Index in rows.parquet.
    """

    pack: int
    document: int
    row: int
