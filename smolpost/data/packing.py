"""Plans which parts of which documents share a pack, from their lengths alone.

A plan never touches tokens, so strategies can be compared on a complete dataset in a second.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackPlan:
    """Pieces of documents, pack after pack.

    Attributes:
        document: [N] index of each piece's document.
        start, stop: [N] the piece is the document's tokens start:stop.
        pack_offsets: [num_packs + 1] pack p holds the pieces pack_offsets[p]:pack_offsets[p + 1].
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    pack_offsets: np.ndarray

    @property
    def num_packs(self) -> int:
        return len(self.pack_offsets) - 1

    def piece_lengths(self) -> np.ndarray:
        """[N] tokens of each piece."""
        return self.stop - self.start

    def pack_lengths(self) -> np.ndarray:
        """[num_packs] tokens of each pack."""
        ends = np.concatenate(([0], np.cumsum(self.piece_lengths())))
        return np.diff(ends[self.pack_offsets])


def unpacked(lengths) -> PackPlan:
    """One document per pack, in order.

    Args:
        lengths: [N] tokens of each document, at least 1.
    Raises:
        ValueError: A length is below 1.
    """
    lengths = checked(lengths)
    documents = np.arange(len(lengths))
    return PackPlan(documents, np.zeros_like(lengths), lengths, np.arange(len(lengths) + 1))


def wrapped(lengths, capacity: int) -> PackPlan:
    """Concatenate all documents and cut every `capacity` tokens: every pack but the last is full.

    Args:
        lengths: [N] tokens of each document, at least 1.
        capacity: Tokens per pack.
    Raises:
        ValueError: A length or the capacity is below 1.
    """
    lengths = checked(lengths)
    if capacity < 1:
        raise ValueError(f"capacity={capacity} is below 1")
    ends = np.cumsum(lengths)
    total = int(lengths.sum())
    cuts = np.arange(0, total, capacity)
    begins = np.sort(np.concatenate((ends - lengths, cuts)), kind="stable")  # two sorted runs: a merge
    begins = begins[np.diff(begins, prepend=-1) > 0]  # of the pieces, in the concatenated text
    stops = np.append(begins[1:], total)[: len(begins)]
    document = np.searchsorted(ends, begins, side="right")
    origin = (ends - lengths)[document]
    pack_offsets = np.append(np.searchsorted(begins, cuts), len(begins))
    return PackPlan(document, begins - origin, stops - origin, pack_offsets)


def best_fit_decreasing(lengths, capacity: int) -> PackPlan:
    """Longest document first, each into the fullest pack that still has room for it; no document is cut.

    Documents of one length are placed together, so the search costs what the distinct lengths cost. Packs come in the
    order of their earliest document, and documents inside a pack in their own order.

    Args:
        lengths: [N] tokens of each document, 1 to capacity.
        capacity: Tokens per pack.
    Raises:
        ValueError: A length is below 1 or above the capacity.
    """
    lengths = checked(lengths)
    if len(lengths) == 0:
        return unpacked(lengths)
    if lengths.max() > capacity:
        worst = int(lengths.argmax())
        raise ValueError(f"document {worst} has {lengths[worst]} tokens, above the capacity {capacity}")
    sizes, counts = np.unique(lengths, return_counts=True)
    first_pack, num_packs, per_pack = place_classes(sizes[::-1].tolist(), counts[::-1].tolist(), capacity).T

    # Run i gives per_pack[i] documents to each of its num_packs[i] packs, in the documents' order by falling length.
    run_start = np.cumsum(num_packs) - num_packs
    packs = np.arange(num_packs.sum()) + np.repeat(first_pack - run_start, num_packs)
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack_of[stable_argsort(capacity - lengths)] = np.repeat(packs, np.repeat(per_pack, num_packs))

    pack_of = renumber_by_first_use(pack_of)
    document = stable_argsort(pack_of)
    pack_offsets = np.concatenate(([0], np.cumsum(np.bincount(pack_of))))
    return PackPlan(document, np.zeros_like(document), lengths[document], pack_offsets)


def place_classes(sizes: list[int], counts: list[int], capacity: int) -> np.ndarray:
    """Best-fit decreasing on classes of equal documents.

    Packs with equal space are interchangeable. A pack that took one document of a class is still the fullest pack with
    space for the next one. So a class fills ranges of packs at a time.

    Args:
        sizes: Distinct lengths, falling, none above the capacity.
        counts: Documents of each length.
    Returns:
        [runs, 3] (first pack, number of packs, documents per pack) in the order of the documents.
    """
    runs = []
    rooms = []  # rising: every room some open pack has
    ranges = {}  # room -> [(first pack, number of packs)] with that room
    num_opened = 0

    def file_away(room, first, number):
        if room:
            if room not in ranges:
                insort(rooms, room)
                ranges[room] = []
            ranges[room].append((first, number))

    def take(room, first, number, each, size):
        if number:
            runs.append((first, number, each))
            file_away(room - each * size, first, number)

    for size, left in zip(sizes, counts, strict=True):
        while left:
            place = bisect_left(rooms, size)
            if place < len(rooms):
                room = rooms[place]
                first, number = ranges[room].pop()
                if not ranges[room]:
                    del ranges[room], rooms[place]
            else:
                room, first = capacity, num_opened
                number = -(-left // (capacity // size))
                num_opened += number
            each = room // size
            full = min(number, left // each)
            take(room, first, full, each, size)
            left -= full * each
            if full < number and left:  # the last pack of this class is left with room for more of it
                take(room, first + full, 1, left, size)
                full, left = full + 1, 0
            if full < number:
                file_away(room, first + full, number - full)
    return np.array(runs, dtype=np.int64)


def checked(lengths) -> np.ndarray:
    """[N] int64 lengths, each at least 1."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.min() < 1:
        worst = int(lengths.argmin())
        raise ValueError(f"document {worst} has {lengths[worst]} tokens, below 1")
    return lengths


def renumber_by_first_use(labels: np.ndarray) -> np.ndarray:
    """[N] the same partition, numbered 0, 1, ... by first appearance; labels are 0 to max, all used."""
    first = np.empty(labels.max() + 1, dtype=np.int64)
    first[labels[::-1]] = np.arange(len(labels))[::-1]  # the last write wins: the earliest position
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[labels]


def stable_argsort(keys: np.ndarray) -> np.ndarray:
    """[N] stable argsort of integers >= 0, by 16-bit digits: numpy sorts those by radix."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    highest = int(keys.max(initial=0))
    for shift in range(16, highest.bit_length(), 16):
        order = order[np.argsort((keys >> shift).astype(np.uint16)[order], kind="stable")]
    return order
