"""Reference log-probabilities on disk: computed once, shared by every seed, loss, beta, ld_alpha and learning rate.

A cache is a folder of chunk files `logps-00000.safetensors`, ... Each holds one tensor "logps", the fp32
log-probabilities of all scored tokens of a fixed range of consecutive pairs, one pair after another, and says whose
they are: the cache's key, the range, how its tokens fall to the pairs, and a checksum of the values. A chunk appears
whole or not at all, so whatever a kill leaves behind is used again.

    cache = ReferenceCache(references / key, key, counts)
    for chunk in cache.missing():
        if chunk % world_size == rank:
            cache.write(chunk, [... for pair in cache.pairs_of(chunk)])
    # barrier
    cache.open()
    cache.read(pair)
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from smolpost.errors import UserError
from smolpost.files import digest, remove_parts, sha256, write_bytes

# Scored tokens of a chunk, about: a few MB per file, so a kill loses little work.
CHUNK_TOKENS = 2**20


class ReferenceCache:
    """The stored log-probabilities of `len(counts)` pairs.

    Args:
        folder: Of this cache alone; made when the first chunk is written.
        key: What `reference_key` gives; a chunk with another key is not this cache's.
        counts: [P] scored tokens of each pair, chosen and rejected together; what both score counts once.
    Raises:
        ValueError: counts is not a row of integers, or one is negative.
    """

    def __init__(self, folder: Path, key: str, counts: np.ndarray):
        counts = np.asarray(counts)
        if counts.ndim != 1 or (len(counts) and counts.dtype.kind not in "iu"):
            raise ValueError(f"counts must be [P] integers, not {counts.shape} {counts.dtype}")
        self.folder, self.key = Path(folder), key
        self.counts = counts.astype(np.int64)
        if len(counts) and self.counts.min() < 0:
            raise ValueError(f"pair {self.counts.argmin()} has {self.counts.min()} scored tokens, below 0")
        self._starts = np.concatenate(([0], np.cumsum(self.counts)))  # [P + 1] in all pairs' tokens
        # A pair belongs to the chunk in whose window of CHUNK_TOKENS it starts; the others make no chunk.
        window = self._starts[:-1] // CHUNK_TOKENS
        self._chunks = np.append(np.flatnonzero(np.diff(window, prepend=-1)), len(counts))  # [num_chunks + 1] in pairs
        self._opened: list[np.ndarray] | None = None

    @property
    def num_chunks(self) -> int:
        return len(self._chunks) - 1

    def pairs_of(self, chunk: int) -> range:
        """The pairs whose log-probabilities the chunk holds."""
        return range(int(self._chunks[chunk]), int(self._chunks[chunk + 1]))

    def missing(self) -> list[int]:
        """The missing chunks, ascending.

        Every chunk that is there is verified; a damaged one is deleted, with one printed line that says why. Ranks
        may call this at the same time; those whose forward passes need one another should all follow one rank's list.
        """
        # Listing the folder, instead of asking for single names, refreshes what a network disk has cached.
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        missing = [c for c in range(self.num_chunks) if self._file(c).name not in present or not self._verified(c)]
        self._sweep(whole=set(range(self.num_chunks)).difference(missing))
        return missing

    def write(self, chunk: int, logps: Sequence[np.ndarray] | np.ndarray) -> None:
        """Store a chunk atomically: other processes see either the old state or the complete chunk.

        Args:
            logps: For each pair of `pairs_of(chunk)` its [counts[pair]] log-probabilities, nats; or all of them in
                one [sum] array.
        Raises:
            UserError: A value is not finite.
            ValueError: Not as many values as counts says.
        """
        values = self._checked(chunk, logps)
        content = save({"logps": values}, metadata=self._label(chunk) | {"crc32": f"{zlib.crc32(values):08x}"})
        file = self._file(chunk)
        try:
            write_bytes(file, content)
        except FileNotFoundError:
            if not file.exists():  # otherwise another run has finished this chunk and removed our part
                raise

    def open(self) -> None:
        """Verify every chunk, once, and map it into memory for `read`.

        Raises:
            UserError: A chunk is missing or damaged.
        """
        if missing := self.missing():
            raise UserError(
                f"{self.folder} lacks {len(missing)} of {self.num_chunks} chunks, the first is "
                f"{self._file(missing[0]).name}; run the stage again to compute them, and on several nodes let run_dir "
                "be a disk that all of them see"
            )
        self._opened = [self._mapped(chunk) for chunk in range(self.num_chunks)]

    def read(self, pair: int) -> np.ndarray:
        """[counts[pair]] fp32 log-probabilities of the pair's scored tokens, in the order in which they were written.

        Raises:
            RuntimeError: The cache has not been opened.
            IndexError: There is no such pair.
        """
        if self._opened is None:
            raise RuntimeError(f"{self.folder} has not been opened")
        if not 0 <= pair < len(self.counts):
            raise IndexError(f"pair {pair} of {len(self.counts)}")
        chunk = int(np.searchsorted(self._chunks, pair, side="right")) - 1
        begin = self._starts[pair] - self._starts[self._chunks[chunk]]
        return np.array(self._opened[chunk][begin : begin + self.counts[pair]])

    def _file(self, chunk: int) -> Path:
        return self.folder / f"logps-{chunk:05d}.safetensors"

    def _label(self, chunk: int) -> dict[str, str]:
        """What a chunk file says of itself, but for the checksum of its values."""
        pairs = self.pairs_of(chunk)
        layout = hashlib.sha256(self.counts[pairs.start : pairs.stop].astype("<i8")).hexdigest()[:16]
        return {"key": self.key, "pairs": f"{pairs.start}:{pairs.stop}", "layout": layout}

    def _num_values(self, chunk: int) -> int:
        first, last = self._chunks[chunk : chunk + 2]
        return int(self._starts[last] - self._starts[first])

    def _checked(self, chunk: int, logps: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """[values of the chunk] fp32 little-endian."""
        pairs = self.pairs_of(chunk)
        if not isinstance(logps, np.ndarray):
            lengths, expected = [len(p) for p in logps], self.counts[pairs.start : pairs.stop].tolist()
            if len(lengths) != len(expected):
                raise ValueError(f"chunk {chunk} has {len(expected)} pairs, not {len(lengths)}")
            if lengths != expected:
                wrong = next(i for i, (n, m) in enumerate(zip(lengths, expected, strict=True)) if n != m)
                raise ValueError(f"pair {pairs[wrong]} has {expected[wrong]} scored tokens, not {lengths[wrong]}")
            logps = np.concatenate(logps) if len(logps) else np.zeros(0)
        values = np.ascontiguousarray(logps, dtype="<f4")
        if values.shape != (self._num_values(chunk),):
            raise ValueError(f"chunk {chunk} has {self._num_values(chunk)} values in one row, not {values.shape}")
        finite = np.isfinite(values)
        if not finite.all():
            place = self._starts[pairs.start] + int(finite.argmin())
            pair = int(np.searchsorted(self._starts, place, side="right")) - 1
            raise UserError(
                f"the reference model gives token {place - self._starts[pair] + 1} of the {self.counts[pair]} scored "
                f"tokens of pair {pair} the log-probability {values[finite.argmin()]}; its weights are damaged or its "
                "arithmetic overflows: check the checkpoint that the stage starts from, or compute in fp32"
            )
        return values

    def _verified(self, chunk: int) -> bool:
        """Whether the file is there and whole; if it is not whole, it is deleted."""
        file = self._file(chunk)
        try:
            seen = file.stat()
            damage = self._damage(chunk)
            if not damage:
                return True
            # Another rank may have found the damage first and already written the chunk again.
            now = file.stat()
            if (now.st_ino, now.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
                return self._verified(chunk)
            file.unlink()
        except FileNotFoundError:
            return False
        print(f"deleted {file}: {damage}; it will be computed again", flush=True)
        return False

    def _damage(self, chunk: int) -> str | None:
        """What is wrong with a chunk file, or None."""
        wanted = ["logps"], "F32", [self._num_values(chunk)]
        try:
            with safe_open(self._file(chunk), "np") as opened:
                label = opened.metadata() or {}
                entry = opened.get_slice("logps")
                shown = list(opened.keys()), entry.get_dtype(), entry.get_shape()
                values = opened.get_tensor("logps") if shown == wanted else None
        except SafetensorError as error:
            return f"it is not a complete safetensors file of log-probabilities ({error})"
        for name, expected in self._label(chunk).items():
            if label.get(name) != expected:
                return f"its {name} is {label.get(name)} where {expected} belongs"
        if values is None:
            return f"it holds {shown} where {wanted} belongs"
        # Damage is accidental, so CRC-32 is enough: it misses one case in four billion and is twice as fast as SHA-256.
        if label.get("crc32") != f"{zlib.crc32(values):08x}":
            return "its values do not have the checksum they were written with"
        if not np.isfinite(values).all():
            return "a value is not finite"
        return None

    def _mapped(self, chunk: int) -> np.ndarray:
        """[values of the chunk] of a verified file, in pages the kernel can take back."""
        number, file = self._num_values(chunk), self._file(chunk)
        if not number:  # an empty file cannot be mapped
            return np.zeros(0, dtype="<f4")
        # The only tensor of a safetensors file ends where the file ends.
        return np.memmap(file, dtype="<f4", mode="r", offset=file.stat().st_size - 4 * number, shape=(number,))

    def _sweep(self, whole: set[int]) -> None:
        """Delete what killed writers left of chunks that are now whole; until then a writer may still be alive."""
        if whole:
            remove_parts(self.folder, {self._file(chunk).name for chunk in whole})


def reference_key(*, rows: str, weights: str, precision: str, context: str, version: int | str) -> str:
    """16 hex digits: a hash of exactly what determines the reference's log-probabilities.

    Args:
        rows: Fingerprint of the pairs' token ids and of which of them are scored.
        weights: `weights_hash` of the reference.
        precision: What the forward pass computes in, e.g. "bf16".
        context: Settings that replace the checkpoint's own, such as the RoPE base.
        version: Of the step that lays out, runs and scores the pairs.
    """
    parts = {"rows": rows, "weights": weights, "precision": precision, "context": context, "version": version}
    return digest(parts, digits=16)


def weights_hash(folder: Path) -> str:
    """SHA-256 of a checkpoint: all its safetensors files and config.json, which holds RoPE's settings, by name.

    Raises:
        UserError: The folder has no safetensors file, or no config.json.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    config = Path(folder) / "config.json"
    if not files or not config.is_file():
        lacking = "config.json" if files else "*.safetensors"
        raise UserError(f"{folder} is not a checkpoint: it has no {lacking}; save it with save_pretrained")
    total = hashlib.sha256()
    for file in [*files, config]:
        total.update(f"{file.name} {sha256(file)}\n".encode())
    return total.hexdigest()
