"""Rows from files, folders and the Hub, checked one by one.

JSONL is read line by line, so each row keeps exactly the keys it was written with. Arrow, Parquet and Hub rows come
with one schema for all rows, where a missing key is None: those keys are removed.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from smolpost.errors import UserError
from smolpost.schema import Source

JSONL_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SUFFIXES = (*JSONL_SUFFIXES, ".parquet")
ROLES = ("system", "user", "assistant", "tool", "function")


class Row(dict):
    """A row that remembers where it was read, for error messages.

    Attributes:
        path: File, folder or Hub id.
        number: Row of it (JSONL: line), from 1.
    """

    __slots__ = ("number", "path")

    def __init__(self, content: dict, path: str, number: int):
        super().__init__(content)
        self.path = path
        self.number = number

    @property
    def where(self) -> str:
        return f"{self.path}:{self.number}"


# ---------------------------------------------------------------- reading


def read_rows(source: Source) -> Iterator[tuple[int, Row]]:
    """The rows of a source from first_row on, at most max_rows.

    A path is a JSONL (also .gz) or Parquet file, a folder of `datasets.save_to_disk`, a folder of such files (all of
    them, by name), or, where it is relative, a Hub id.

    Yields:
        (number, row), number as in Row.
    Raises:
        UserError: The path or split does not exist, there is no row, or a row cannot be read.
    """
    if source.first_row < 0 or (source.max_rows is not None and source.max_rows < 1):
        raise UserError(
            f"{source.path}: first_row={source.first_row}, max_rows={source.max_rows}; "
            "expected first_row >= 0 and max_rows >= 1 or null"
        )
    stop = None if source.max_rows is None else source.first_row + source.max_rows
    row = None
    for row in islice(all_rows(source), source.first_row, stop):
        yield row.number, row
    if row is None and source.first_row:
        raise UserError(f"{source.path}: no row is left from first_row={source.first_row} on; lower first_row")
    if row is None:
        raise UserError(f"{source.path}: is empty; expected at least one row")


def all_rows(source: Source) -> Iterator[Row]:
    path = Path(source.path)
    if is_hub_id(source):
        yield from dataset_rows(hub_dataset(source), source.path)
    elif path.is_file():
        yield from file_rows(path)
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from dataset_rows(saved_dataset(source), source.path)
    else:
        for file in data_files(path):
            yield from file_rows(file)


def is_hub_id(source: Source) -> bool:
    """Whether the path names a Hub dataset.

    Raises:
        UserError: It is neither an existing file or folder nor a possible Hub id.
    """
    if Path(source.path).exists():
        return False
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source.path) and not source.path.endswith(SUFFIXES):
        return True
    raise UserError(f"{source.path}: does not exist; expected a JSONL or Parquet file, a datasets folder or a Hub id")


def data_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES))
    if not files:
        raise UserError(f"{folder}: holds no data file; expected files that end in {', '.join(SUFFIXES)}")
    return files


def file_rows(path: Path) -> Iterator[Row]:
    if path.name.endswith(JSONL_SUFFIXES):
        return jsonl_rows(path)
    if path.suffix == ".parquet":
        return parquet_rows(path)
    raise UserError(f"{path}: is of no known kind; expected a name that ends in {', '.join(SUFFIXES)}")


def jsonl_rows(path: Path) -> Iterator[Row]:
    """One row per line that is not blank."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Row(parsed(line, f"{path}:{number}"), str(path), number)
        except (gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"{path}: is no whole gzip file ({error}); compress it again") from error


def parsed(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: is no JSON ({error.msg} at column {error.colno}); expected one JSON object per line"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is no UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: is a JSON {type(row).__name__}; expected one JSON object per line")
    return row


def parquet_rows(path: Path) -> Iterator[Row]:
    try:
        batches = pq.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield Row(without_none(row), str(path), number)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: is no readable Parquet file ({one_line(error)}); write it again") from error


def dataset_rows(dataset, path: str) -> Iterator[Row]:
    for number, row in enumerate(dataset.with_format(None), start=1):
        yield Row(without_none(row), path, number)


def saved_dataset(source: Source):
    """The `datasets` folder's Dataset, or the split of its DatasetDict."""
    import datasets  # takes a second, and JSONL needs none of it

    dataset = datasets.load_from_disk(source.path)
    if isinstance(dataset, datasets.DatasetDict):
        if source.split not in dataset:
            raise UserError(f"{source.path}: has no split {source.split!r}; expected one of {', '.join(dataset)}")
        return dataset[source.split]
    return dataset


def hub_dataset(source: Source):
    import datasets

    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError) as error:  # no such id, subset, split; a script; no network
        raise UserError(
            f"{source.path}: cannot be read as a file, folder or Hub dataset (subset {source.subset}, split "
            f"{source.split}, revision {source.revision}): {one_line(error)}; check path, names, HF_TOKEN and network"
        ) from error


def without_none(value):
    """The value without the keys that hold None, at any depth: Arrow fills them in where rows differ."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------- checking


def validate_row(row: dict, where: str) -> str:
    """The row's shape: "preference", "messages" or "text".

    Args:
        row: Preference rows hold `chosen` and `rejected`, two full conversations, and may hold `prompt`, a string or
            messages; rows with `messages` and `text` are conversations.
        where: File and row, for the message.
    Raises:
        UserError: The row has no known shape, or breaks its shape's rules.
    """
    for key, kind in (("chat_template_kwargs", dict), ("tools", list)):
        if row.get(key) is not None and not isinstance(row[key], kind):
            expected = "an object" if kind is dict else "a list of JSON schemas"
            raise UserError(f"{where}: {key} is a {type(row[key]).__name__}; expected {expected} or null")
    if "chosen" in row and "rejected" in row:
        check_pair(row, where)
        return "preference"
    if "messages" in row:
        check_messages(row["messages"], f"{where}: messages")
        return "messages"
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"]:
            found = "empty" if row["text"] == "" else f"a {type(row['text']).__name__}"
            raise UserError(f"{where}: text is {found}; expected a string with content, or delete the row")
        return "text"
    raise UserError(
        f"{where}: has the columns {', '.join(row) or 'none'}; expected messages, or chosen and rejected, or text; "
        "rename the columns"
    )


def check_pair(row: dict, where: str) -> None:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is not None and not isinstance(prompt, str | list):
        raise UserError(f"{where}: prompt is a {type(prompt).__name__}; expected a string or a list of messages")
    for key in ("chosen", "rejected"):
        check_messages(row[key], f"{where}: {key}")
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are equal; expected two different replies; delete the row")
    if chosen[0] != rejected[0] or min(len(chosen), len(rejected)) < 2:
        raise UserError(
            f"{where}: chosen and rejected share no prompt; expected two full conversations that begin with the same "
            "messages; put the prompt's messages before both replies"
        )
    shared = next(i for i, pair in enumerate(zip_longest(chosen, rejected)) if pair[0] != pair[1])
    for key in ("chosen", "rejected"):
        if not any(message["role"] == "assistant" for message in row[key][shared:]):
            raise UserError(f"{where}: {key} has no assistant turn after the shared prompt; there is nothing to prefer")


def check_messages(messages, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        found = "empty" if messages == [] else f"a {type(messages).__name__}"
        raise UserError(f"{where} is {found}; expected a list of messages, each with role and content")
    for i, message in enumerate(messages):
        check_message(message, f"{where}[{i}]")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where} has no assistant turn; expected at least one to train on; delete the row")


def check_message(message, where: str) -> None:
    if not isinstance(message, dict):
        raise UserError(f"{where} is a {type(message).__name__}; expected an object with role and content")
    role = message.get("role")
    if role is None:
        raise UserError(f"{where} has no role, only {', '.join(message) or 'nothing'}; expected role and content")
    if role not in ROLES:
        raise UserError(f"{where}.role is {role!r}; expected one of {', '.join(ROLES)}; rename the role")
    content = message.get("content")
    if content is None:
        without_text = ("tool_calls", "function_call", "reasoning_content", "reasoning")
        if role == "assistant" and any(message.get(key) for key in without_text):
            return
        raise UserError(f"{where} has no content; expected a string (null only in an assistant turn with tool_calls)")
    if not isinstance(content, str | list):
        raise UserError(f"{where}.content is a {type(content).__name__}; expected a string or a list of text parts")


# ---------------------------------------------------------------- content


def fingerprint(source: Source) -> str:
    """A name for the content: sha256 of a file's or folder's bytes, or `id@revision/subset/split` of a Hub dataset.

    Which rows are taken (split of a folder, first_row, max_rows) is not part of it.

    Raises:
        UserError: The path does not exist.
    """
    if is_hub_id(source):
        return f"{source.path}@{source.revision or 'main'}/{source.subset or 'default'}/{source.split}"
    path = Path(source.path)
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith("cache-"):  # `datasets` drops caches of map() beside the data
            digest.update(f"{file.relative_to(path)}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
