"""What texts have in common: their word n-grams, and two indexes that find shared ones.

W words, G n-grams, P permutations of a MinHash, N rows kept, B bands of a signature.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

# Scripts written without spaces: Thai, Lao, Burmese, Khmer, kana, ideographs. Each of their characters is a word.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
SHORTEST_TEXT = 5  # words; fewer ("Yes.", "The answer is 72.") say nothing of where a text is from
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing modulo 2^64
BATCH_GRAMS = 1 << 16  # of one MinHash step, which holds P values for each
RECALL = 0.99  # least share of the pairs at the threshold that the bands find


# ---------------------------------------------------------------- words


class Separated(dict):
    """Code point -> its replacement between words; filled as characters occur."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Cf":  # soft hyphens, joiners, direction marks: part of a word, invisible
            text = ""
        elif category[0] in "PSZ" or category in ("Cc", "Cs"):
            text = " "
        else:
            text = f" {character} " if UNSPACED.match(character) else character
        self[code] = text
        return text


SEPARATED = Separated()


def words_of(text: str) -> list[str]:
    """Casefolded words (NFKC) without punctuation and symbols, which separate words; [] where nothing else is there.

    A character of a script without spaces is a word. Lone surrogates separate words.
    """
    return unicodedata.normalize("NFKC", text).casefold().translate(SEPARATED).split()


def gram_hashes(words: list[str], n: int) -> np.ndarray:
    """[max(0, W - n + 1)] uint64, one for each n words in a row; the same in every process."""
    count = len(words) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in words), np.uint64, len(words))
    total = hashes[:count].copy()
    for i in range(1, n):
        total *= MULTIPLIER
        total += hashes[i : i + count]
    return total


# ---------------------------------------------------------------- near duplicates


@lru_cache(maxsize=4)
def blank_minhash(permutations: int):
    from datasketch import MinHash  # an extra

    return MinHash(num_perm=permutations, hashfunc=int)


def signature_of(words: list[str], n: int, permutations: int) -> np.ndarray | None:
    """MinHash of the set of word n-grams; a text of fewer words is its own only n-gram.

    Returns:
        [P] uint32, or None for a text without words, which resembles nothing.
    """
    if not words:
        return None
    grams = gram_hashes(words, min(n, len(words))) >> np.uint64(32)
    minhash = blank_minhash(permutations).copy()
    for first in range(0, len(grams), BATCH_GRAMS):
        minhash.update_batch(grams[first : first + BATCH_GRAMS].tolist())
    return minhash.hashvalues


class SignatureIndex:
    """Signatures of kept rows, and which of them are similar to another.

    Locality-sensitive hashing (Mining of Massive Datasets, chapter 3): similar signatures agree on all values of some
    band. Each band has a hash table without keys: `heads` maps a slot to the row added last, and `links` leads to the
    row before it. Signatures are compared afterwards, so rows that share a slot by chance do no harm. A row costs 4P
    bytes for its signature and 8B to 12B for its bands: at most 764 for 128 permutations and a threshold of 0.8.
    datasketch's MinHashLSH, with a Python set for each slot, takes about five times as much.

    Args:
        permutations: P.
        threshold: Least share of equal values of two similar signatures, in (0, 1].
    """

    def __init__(self, permutations: int, threshold: float):
        self.threshold = threshold
        self.band_size = band_size(permutations, threshold)
        self.bands = np.arange(permutations // self.band_size)
        shape = (len(self.bands), self.band_size)
        self.multipliers = np.random.default_rng(0).integers(1 << 64, size=shape, dtype=np.uint64) | np.uint64(1)
        self.size = 0
        self.signatures = np.empty((0, permutations), np.uint32)
        self.grow(1 << 10)

    def add(self, signature: np.ndarray) -> tuple[int, float] | None:
        """Keep a signature, [P] uint32, unless it is similar to a kept one.

        Returns:
            None if it was kept; otherwise the number of the most similar kept one, from 0, and the share of equal
            values.
        """
        slots = self.slots(signature)
        candidates = self.candidates(slots)
        if len(candidates):
            similarities = (self.signatures[candidates] == signature).mean(axis=1)
            best = int(similarities.argmax())
            if similarities[best] >= self.threshold:
                return int(candidates[best]), float(similarities[best])
        if self.size == len(self.signatures):
            self.grow(2 * self.size)
            slots = self.slots(signature)
        self.signatures[self.size] = signature
        self.links[self.size] = self.heads[self.bands, slots]
        self.heads[self.bands, slots] = self.size
        self.size += 1
        return None

    def candidates(self, slots: np.ndarray) -> np.ndarray:
        """Rows that share a slot, ascending."""
        bands, rows, found = self.bands, self.heads[self.bands, slots], []
        while len(rows):
            there = rows >= 0
            bands, rows = bands[there], rows[there]
            found.append(rows)
            rows = self.links[rows, bands]
        return np.unique(np.concatenate(found))

    def slots(self, signatures: np.ndarray) -> np.ndarray:
        """[..., P] -> [..., B] slot of each band."""
        banded = signatures[..., : self.multipliers.size].reshape(*signatures.shape[:-1], *self.multipliers.shape)
        return (banded * self.multipliers).sum(axis=-1) >> self.shift

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` rows, a power of two; the tables are built again."""
        kept = self.signatures[: self.size]
        self.signatures = np.empty((capacity, kept.shape[1]), np.uint32)  # pages not yet written take no memory
        self.signatures[: self.size] = kept
        self.shift = np.uint64(64 - capacity.bit_length() + 1)
        self.heads = np.full((len(self.bands), capacity), -1, np.int32)
        self.links = np.empty((capacity, len(self.bands)), np.int32)
        if not self.size:
            return
        slots = np.concatenate([self.slots(part) for part in np.array_split(kept, -(-self.size // BATCH_GRAMS))])
        for band in self.bands:
            order = np.argsort(slots[:, band], kind="stable").astype(np.int32)
            ordered = slots[order, band]
            is_first = np.concatenate(([True], ordered[1:] != ordered[:-1]))
            self.links[order, band] = np.where(is_first, -1, np.roll(order, 1))
            self.heads[band, ordered] = order  # of a slot's rows the last stays


def band_size(permutations: int, threshold: float) -> int:
    """Most values per band by which pairs at the threshold still share a band, RECALL of them."""
    sizes = range(permutations, 1, -1)
    return next((r for r in sizes if (1 - threshold**r) ** (permutations // r) <= 1 - RECALL), 1)


# ---------------------------------------------------------------- evaluation texts


@dataclass(frozen=True)
class EvaluationTexts:
    """Word n-grams of evaluation texts.

    Attributes:
        n: Words of an n-gram.
        texts, rows: Words of each text that has n of them, joined by spaces, and its file and row.
        hashes: [G] uint64, ascending and distinct; text and start, [G] each, say whose n-gram it is, and from which
            word on.
        whole: Texts of fewer than n and at least SHORTEST_TEXT words -> file and row.
    """

    n: int
    texts: list[str]
    rows: list[str]
    hashes: np.ndarray
    text: np.ndarray
    start: np.ndarray
    whole: dict[str, str]

    @classmethod
    def of(cls, texts: list[tuple[str, list[str]]], n: int) -> "EvaluationTexts":
        """Of (file and row, words) pairs; n-grams and texts that occur twice count as the first's."""
        long = [(row, words) for row, words in texts if len(words) >= n]
        grams = [gram_hashes(words, n) for _, words in long]
        offsets = np.cumsum([0, *map(len, grams)])
        hashes, first = np.unique(np.concatenate([np.empty(0, np.uint64), *grams]), return_index=True)
        text = np.searchsorted(offsets, first, side="right") - 1
        whole = {}
        for row, words in texts:
            if SHORTEST_TEXT <= len(words) < n:
                whole.setdefault(" ".join(words), row)
        rows = [row for row, _ in long]
        return cls(n, [" ".join(words) for _, words in long], rows, hashes, text, first - offsets[text], whole)

    def find(self, words: list[str]) -> tuple[str, str] | None:
        """The first n-gram of a text that is an evaluation text's, or the text, where it is one of `whole`.

        Returns:
            The words shared, joined by spaces, and the evaluation file and row.
        """
        if len(words) < self.n:
            text = " ".join(words)
            return (text, self.whole[text]) if text in self.whole else None
        if not len(self.hashes):
            return None
        grams = gram_hashes(words, self.n)
        places = np.minimum(np.searchsorted(self.hashes, grams), len(self.hashes) - 1)
        for i in np.flatnonzero(self.hashes[places] == grams):
            text, start = self.text[places[i]], self.start[places[i]]
            shared = words[i : i + self.n]
            if self.texts[text].split()[start : start + self.n] == shared:  # equal hashes are not yet equal words
                return " ".join(shared), self.rows[text]
        return None
