"""Ragged integer columns, streamed into a folder that `datasets.load_from_disk` opens memory-mapped.

Written chunk by chunk, so neither a second copy of the tokens nor an array above 2^31 elements ever exists.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

CHUNK_TOKENS = 2**23  # of one record batch, about


def write_dataset(folder: Path, types: dict[str, str], chunks: Iterable[dict[str, tuple[np.ndarray, np.ndarray]]]):
    """Write a dataset whose columns are lists of integers.

    Args:
        folder: Exists.
        types: Column -> integer type, e.g. {"input_ids": "int32"}.
        chunks: Column -> (values [T], lengths [rows]) of some rows: all values, row after row.
    """
    features = datasets.Features({name: datasets.List(datasets.Value(dtype)) for name, dtype in types.items()})
    schema = features.arrow_schema
    content = hashlib.sha256()
    file = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(str(folder / file), schema) as stream:
        for chunk in chunks:
            lists = []
            for name, dtype in types.items():
                values, lengths = chunk[name]
                values = np.ascontiguousarray(values, dtype=dtype)
                offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
                content.update(values)
                content.update(offsets)
                lists.append(pa.ListArray.from_arrays(offsets, values))
            stream.write_batch(pa.RecordBatch.from_arrays(lists, schema=schema))
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    # What Dataset.save_to_disk writes beside the data; the fingerprint keeps caches of different content apart.
    state = {
        "_data_files": [{"filename": file}],
        "_fingerprint": content.hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))


def concatenated(parts: Iterable, dtype) -> np.ndarray:
    """[T] the sequences one after another."""
    arrays = [np.asarray(part, dtype=dtype) for part in parts]
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
