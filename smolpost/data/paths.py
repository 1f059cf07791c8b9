"""What a source's path means: a file, a pattern, a folder with its splits, or a Hub id."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path

import pyarrow as pa

from smolpost.errors import UserError
from smolpost.schema import Source

JSONL_SUFFIXES = (".jsonl", ".json")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
COMPRESSED_SUFFIXES = tuple(suffix + packed for packed in COMPRESSIONS for suffix in JSONL_SUFFIXES)
SUFFIXES = (*JSONL_SUFFIXES, *COMPRESSED_SUFFIXES, ".parquet")
EXPECTED = f"expected names that end in {', '.join(SUFFIXES)}"


def parts(source: Source) -> list[tuple[str, str]]:
    """(path, kind) of every file or dataset that is read, in order."""
    path = Path(source.path)
    if is_hub_id(source):
        return [(source.path, "hub")]
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        splits = saved_entry(path / "dataset_dict.json", "splits")
        return [(str(path / split), "arrow") for split in asked_splits(source, splits)]
    if path.is_dir() and (path / "state.json").is_file():
        own = saved_entry(path / "state.json", "_split")
        asked_splits(source, dict.fromkeys(["train", own or "train"]))
        return [(str(path), "arrow")]
    if path.is_dir():
        splits = split_files(path)
        files = [file for split in asked_splits(source, splits) for file in splits[split]]
    else:
        asked_splits(source, ["train"])
        files = [path] if path.is_file() else matching_files(source.path)
    return [(str(file), kind_of_file(file)) for file in files]


def is_hub_id(source: Source) -> bool:
    """Whether the path names a Hub dataset.

    Raises:
        UserError: It is neither an existing file or folder, nor a pattern, nor a possible Hub id.
    """
    if Path(source.path).exists() or has_magic(source.path):
        return False
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source.path) and not source.path.endswith(SUFFIXES):
        return True
    raise UserError(f"{source.path}: does not exist; expected a JSONL or Parquet file, a datasets folder or a Hub id")


def saved_entry(file: Path, key: str):
    """An entry of a JSON file that `datasets.save_to_disk` wrote."""
    try:
        return json.loads(file.read_text())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: has no {key} as datasets.save_to_disk writes it ({one_line(error)}); save the dataset again"
        ) from error


def asked_splits(source: Source, splits: Iterable[str]) -> list[str]:
    asked = source.split.split("+")
    for name in asked:
        if name not in splits:
            remedy = "; slices are for Hub ids, use first_row and max_rows" if "[" in name else ""
            raise UserError(f"{source.path}: has no split {name!r}; expected one of {', '.join(splits)}{remedy}")
    return asked


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Split -> data files of a plain folder, by the names that `datasets` goes by; without such names all are train.

    As in `datasets`, dev, valid and val are names for validation, eval and evaluation for test, and where some names
    tell their split, files whose names do not belong to none.
    """
    from datasets import data_files  # takes a second, and files need none of it
    from fsspec.utils import glob_translate

    names = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    names = [
        name.as_posix()
        for name in names
        if name.name.endswith(SUFFIXES)
        and name.name not in data_files.FILES_TO_IGNORE
        and not any(part.startswith((".", "__")) for part in name.parts)
    ]
    if not names:
        raise UserError(f"{folder}: has no data file; {EXPECTED}")

    def matching(pattern: str) -> list[str]:
        return [name for name in names if re.match(glob_translate(pattern), name)]

    # The public get_data_patterns looks at every file, so that a train_log.txt would become the split train.
    try:
        patterns = data_files._get_data_files_patterns(matching)
    except ValueError as error:  # data/{split}-00000-of-00001 with a split that is not a word
        raise UserError(f"{folder}: {one_line(error)}; rename the files") from error
    found = {split: dict.fromkeys(itertools.chain(*map(matching, of))) for split, of in patterns.items()}
    return {str(split): [folder / name for name in sorted(files)] for split, files in found.items()}


def matching_files(pattern: str) -> list[Path]:
    files = [Path(path) for path in sorted(glob(pattern, recursive=True)) if Path(path).is_file()]
    if not files:
        raise UserError(f"{pattern}: matches no file; check the pattern (** matches any number of folders)")
    return files


def kind_of_file(path: Path) -> str:
    if path.name.endswith(JSONL_SUFFIXES):
        return "jsonl"
    if path.name.endswith(COMPRESSED_SUFFIXES):
        return "compressed"
    if path.suffix == ".parquet":
        return "parquet"
    raise UserError(f"{path}: is of no known kind; {EXPECTED}")


@contextmanager
def readable(path: str, kind: str, remedy: str) -> Iterator[None]:
    """Say what the file is not, and what to do."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a readable {kind} ({one_line(error)}); {remedy}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
