"""Ragged integer columns, streamed into a folder that `datasets.load_from_disk` opens memory-mapped.

Written chunk by chunk, so neither a second copy of the tokens nor an array above 2^31 elements ever exists.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher

CHUNK_TOKENS = 2**18  # of one record batch, about: its columns stay in the processor's cache from gathering to writing


def write_dataset(folder: Path, types: dict[str, str], chunks: Iterable[dict[str, tuple[np.ndarray, np.ndarray]]]):
    """Write a dataset whose columns are lists of integers.

    Args:
        folder: Exists.
        types: Column -> integer type, e.g. {"input_ids": "int32"}.
        chunks: Column -> (values [T], lengths [rows]) of some rows: all values, row after row.
    """
    features = datasets.Features({name: datasets.List(datasets.Value(dtype)) for name, dtype in types.items()})
    schema = features.arrow_schema
    fingerprint = Hasher.hash_bytes(str(types).encode())
    file = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(str(folder / file), schema) as stream:
        for chunk in chunks:
            lists = []
            for name, dtype in types.items():
                values, lengths = chunk[name]
                values = np.ascontiguousarray(values, dtype=dtype)
                offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
                fingerprint = Hasher.hash_bytes([fingerprint.encode(), values, offsets])
                lists.append(pa.ListArray.from_arrays(offsets, values))
            stream.write_batch(pa.RecordBatch.from_arrays(lists, schema=schema))
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    # What Dataset.save_to_disk writes beside the data. The fingerprint tells caches of different content apart, so it
    # is made as in `datasets` (xxh64): much faster than SHA-256, and nothing here is signed.
    state = {
        "_data_files": [{"filename": file}],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))


def list_lengths(rows: datasets.Dataset, column: str) -> np.ndarray:
    """[N] elements of a list column, from the offsets alone."""
    return rows.data.column(column).combine_chunks().value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)


def list_sums(
    rows: datasets.Dataset, column: str, of: Callable[[np.ndarray], np.ndarray] = lambda values: values
) -> np.ndarray:
    """[N] int64 sum of each list of a column, an empty one 0.

    Args:
        of: What is summed, from the values of many lists, one for each value.
    """
    sums = []
    for chunk in rows.data.column(column).chunks:
        ends = np.concatenate(([0], np.cumsum(of(chunk.flatten().to_numpy()), dtype=np.int64)))
        offsets = np.concatenate(([0], np.cumsum(chunk.value_lengths().to_numpy())))
        sums.append(np.diff(ends[offsets]))
    return np.concatenate(sums) if sums else np.zeros(0, np.int64)
