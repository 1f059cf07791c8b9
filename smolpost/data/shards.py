"""Tokenization in many processes: one file for each shard of a source, written completely or not at all."""

import contextlib
import gc
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from smolpost.data.row_shapes.shape import RowShape
from smolpost.data.settings import Rows
from smolpost.data.source_slice import SourceSlice, joined
from smolpost.data.sources import read_slice, slices
from smolpost.data.tokenize import SCHEMA, admitted, token_batches
from smolpost.errors import UserError
from smolpost.files import remove_parts, replacing
from smolpost.progress import Progress
from smolpost.registry import ROW_SHAPES
from smolpost.schema import Source
from smolpost.signals import default_in_fork

SHARD_ROWS = 256  # of a source: small enough to keep all workers busy, and to lose little to a kill
MAX_SHARDS = 512  # of a source: shards of more rows, so that millions of rows make hundreds of files


def shard_slices(source: Source) -> list[SourceSlice]:
    """The rows of a source, cut into one slice for each shard; the cut does not depend on the number of workers.

    Raises:
        UserError: As `sources.slices`.
    """
    parts = slices(source, SHARD_ROWS)
    return joined(parts, max(SHARD_ROWS, -(-sum(part.num_rows for part in parts) // MAX_SHARDS)))


@dataclass(frozen=True)
class TokenShard:
    """Some rows of a slice of a source, and the file for their tokens.

    Attributes:
        rows: Indices in the slice, from 0, ascending.
    """

    folder: Path
    source: Source
    part: SourceSlice
    rows: np.ndarray

    @property
    def file(self) -> Path:
        rows = hashlib.sha256(self.rows.astype(np.int64).tobytes()).hexdigest()[:12]
        return self.folder / f"{self.part.first:010d}-{self.part.num_rows}-{rows}.arrow"

    def is_whole(self) -> bool:
        """Whether the file exists and has the end of an Arrow file."""
        try:
            with pa.memory_map(str(self.file)) as file:
                return pa.ipc.open_file(file).schema.equals(SCHEMA)
        except (FileNotFoundError, pa.ArrowInvalid):
            return False


@dataclass(frozen=True)
class Tokenize:
    """Turns rows into tokens; sent to each worker once.

    Attributes:
        features: Computes what hygiene compares of a row; None without hygiene.
    """

    stage: Rows
    tokenizer: PreTrainedTokenizerBase
    features: Callable[[dict], bytes] | None = None

    def __call__(self, shard: TokenShard) -> int:
        """Make the shard's file; returns its number of rows.

        Raises:
            UserError: The rows cannot be read, or all of the first SHARD_ROWS rows of a source are refused: then the
                recipe is wrong, not the rows.
        """
        taken = iter(shard.rows.tolist())
        layout = self.stage.layout
        rows = (admitted(row, shard.source, layout) for row in nth(read_slice(shard.source, shard.part), taken))
        num_read, num_refused, fault = 0, 0, None
        with replacing(shard.file) as part, pa.ipc.new_file(part, SCHEMA) as writer, garbage_kept():
            for batch in token_batches(self.stage, rows, self.tokenizer, self.features):
                writer.write_batch(batch)
                num_read += len(batch)
                num_refused += len(batch) - batch["fault"].null_count
                fault = fault or next(filter(None, batch["fault"].to_pylist()), None)
                if num_refused == num_read >= SHARD_ROWS and shard.part.first == 0:
                    raise UserError(f"{fault} (so are all of the first {num_read} rows)")
        return len(shard.rows)


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """No collection of cyclic garbage: a shard makes little of it, and a collection visits every token list."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def nth(values, places):
    """The values at ascending places."""
    place = next(places, None)
    for i, value in enumerate(values):
        if i == place:
            yield value
            place = next(places, None)
            if place is None:
                return


def tokenize_shards(shards: list[TokenShard], tokenize: Tokenize, num_workers: int, description: str) -> None:
    """Make the missing files; they are the same for any number of workers.

    Raises:
        UserError: As `Tokenize`, for the first bad shard in their order, whichever worker finds it.
    """
    missing = [shard for shard in shards if not shard.is_whole()]
    for folder in {shard.folder for shard in missing if shard.folder.is_dir()}:
        remove_parts(folder)  # of a killed process; the caller holds the lock
    total = sum(len(shard.rows) for shard in shards)
    done = total - sum(len(shard.rows) for shard in missing)
    num_workers = min(num_workers, len(missing))
    with Progress(description, total, "row", done=done) as progress:
        if num_workers <= 1:
            for shard in missing:
                progress.update(tokenize(shard))
            return
        # As in `datasets.map`: a forked worker has the tokenizer at once; a spawned one imports for seconds.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        given = (tokenize, [*ROW_SHAPES.values()])
        with ProcessPoolExecutor(num_workers, context, initializer=receive, initargs=given) as pool:
            try:
                for num_rows in pool.map(tokenize_here, missing):
                    progress.update(num_rows)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


_tokenize: Tokenize  # of this worker


def receive(tokenize: Tokenize, row_shapes: list[RowShape]) -> None:
    """In a new worker: what it does, and how it ends.

    Args:
        row_shapes: A spawned worker imports the modules that define them, which registers them.
    """
    global _tokenize
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel already
    default_in_fork()
    threading.Thread(target=end_with_parent, daemon=True).start()
    _tokenize = tokenize


def end_with_parent() -> None:
    """End with the parent: a worker whose parent was killed would wait for work forever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def tokenize_here(shard: TokenShard) -> int:
    return _tokenize(shard)
