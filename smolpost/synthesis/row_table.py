"""Rows and provenance as Parquet files with fixed columns, written in row groups of bounded size.

The columns are the same whatever the rows hold, so a key that some rows lack cannot turn up as a null with a meaning.
That would matter for `enable_thinking`: null counts as "thinking off". Every row therefore states its mode.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from smolpost.data.prompts import mode_of

ROWS, PROVENANCE_ROWS = "rows.parquet", "provenance.parquet"
BATCH_ROWS = 256  # turned into Arrow at a time
GROUP_BYTES = 32 * 2**20  # of a row group in memory, at which it is written

_TEXT = pa.string()
_CALL = pa.struct(
    {"id": _TEXT, "type": _TEXT, "function": pa.struct({"name": _TEXT, "arguments": _TEXT})}  # arguments: JSON
)
_TURN = pa.struct(
    {
        "role": _TEXT, "content": _TEXT, "reasoning_content": _TEXT, "tool_calls": pa.list_(_CALL),
        "tool_call_id": _TEXT, "name": _TEXT, "train": pa.bool_(),
    }
)  # fmt: skip
_KWARGS = pa.struct(
    {
        "custom_instructions": _TEXT, "enable_thinking": pa.bool_(), "python_tools": pa.list_(_TEXT),
        "xml_tools": pa.list_(_TEXT),
    }
)  # fmt: skip
_SHARED = {"chat_template_kwargs": _KWARGS, "tools": _TEXT, "source": _TEXT}
MESSAGES = pa.schema({"id": _TEXT, "messages": pa.list_(_TURN), **_SHARED})
PAIRS = pa.schema(
    {"id": _TEXT, "prompt": _TEXT, "chosen": pa.list_(_TURN), "rejected": pa.list_(_TURN), **_SHARED}
)  # fmt: skip

_VERDICT = pa.struct({"filter": _TEXT, "passed": pa.bool_(), "reason": _TEXT, "score": pa.float64()})
_REPLY = pa.struct(
    {
        "role": _TEXT, "sample": pa.int32(), "turn": pa.int32(), "model": _TEXT, "revision": _TEXT, "server": _TEXT,
        "server_version": _TEXT, "template_hash": _TEXT, "sampling": _TEXT, "seed": pa.int64(), "finish_reason": _TEXT,
        "prompt_tokens": pa.int64(), "completion_tokens": pa.int64(), "attempts": pa.int32(), "seconds": pa.float64(),
        "raw": _TEXT,
    }
)  # fmt: skip
PROVENANCE = pa.schema(
    {
        "id": _TEXT, "source": _TEXT, "row_hash": _TEXT, "status": _TEXT, "reason": _TEXT, "error": _TEXT,
        "verdicts": pa.list_(_VERDICT), "replies": pa.list_(_REPLY),
    }
)  # fmt: skip


class Table:
    """A Parquet file that grows by row groups."""

    def __init__(self, file: Path, schema: pa.Schema):
        self._schema = schema
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == BATCH_ROWS:
            self._convert()
            if sum(batch.nbytes for batch in self._batches) >= GROUP_BYTES:
                self._write()

    def close(self) -> None:
        self._convert()
        self._write()
        self._writer.close()

    def _convert(self) -> None:
        if self._rows:
            self._batches.append(pa.RecordBatch.from_pylist(self._rows, self._schema))
            self._rows = []

    def _write(self) -> None:
        if self._batches:
            table = pa.Table.from_batches(self._batches)
            self._writer.write_table(table, row_group_size=len(table))
            self._batches = []


@contextlib.contextmanager
def table(file: Path, schema: pa.Schema) -> Iterator[Table]:
    """A new file, complete when the block ends well."""
    opened = Table(file, schema)
    yield opened
    opened.close()


def further_kwargs(row: dict[str, Any]) -> list[str]:
    """The keys of a row's `chat_template_kwargs` that have no column, so that the row cannot be written."""
    kwargs = row.get("chat_template_kwargs") or {}
    return [key for key, value in kwargs.items() if value is not None and _KWARGS.get_field_index(key) < 0]


def as_entry(identity: str, row: dict[str, Any]) -> dict[str, Any]:
    """A SmolTalk2 row as MESSAGES or PAIRS have it.

    What has no fixed form becomes JSON text, as OpenAI writes calls' arguments: tools, arguments and tool objects. The
    readers of rows turn it back.

    Args:
        row: With `messages`, or `chosen` and `rejected`. Without a stated mode it thinks, as under the chat template.
    """
    kwargs = row.get("chat_template_kwargs") or {}
    sides = {key: [_turn(message) for message in row[key]] for key in ("messages", "chosen", "rejected") if key in row}
    return {
        "id": identity,
        "prompt": _text(row.get("prompt")),
        **sides,
        "chat_template_kwargs": {
            "custom_instructions": kwargs.get("custom_instructions"),
            "enable_thinking": mode_of(row) == "think",
            "python_tools": _texts(kwargs.get("python_tools")),
            "xml_tools": _texts(kwargs.get("xml_tools")),
        },
        "tools": _text(row.get("tools") or None),
        "source": row["source"],
    }


def json_text(value: Any) -> str:
    """Compact JSON, with half surrogate pairs as the escapes that they came as."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return json.dumps(value)


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call(call) for call in calls] if calls else None}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _text(function.get("arguments"))}}


def _texts(values: Any) -> list[str]:
    values = [values] if isinstance(values, str) and values else values or []
    return [text for value in values if (text := _text(value)) is not None]


def _text(value: Any) -> str | None:
    """A text as it is, another value as JSON in the form that chat templates give it."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
