"""Conversations as rows of a JSONL file that other programs may write, too."""

import fcntl
import json
from pathlib import Path
from typing import Any

from smolpost.data.rows import parse_row
from smolpost.errors import UserError
from smolpost.files import replacing


class SavedRow:
    """One row of a file, written again as its conversation goes on.

    The file is replaced as a whole under a lock, so that it holds complete lines at any time and keeps the rows that
    others add meanwhile.

    Args:
        file: It is made with the first row.
    Raises:
        UserError: There is something else in its place.
    """

    def __init__(self, file: Path):
        self.file, self._line = file, b""
        if file.is_dir():
            raise UserError(f"{file} is a folder; name a JSONL file, such as {file / 'chats.jsonl'}")
        if file.exists() and (lines := file.read_bytes().strip().splitlines()):
            try:
                parse_row(lines[-1], f"{file}:{len(lines)}")
            except UserError as error:
                raise UserError(f"{error}; conversations are added to a JSONL file of rows, name another one") from None

    def write(self, row: dict[str, Any] | None) -> None:
        """Put the row in place of the one that was written before; None removes that one."""
        line = b"" if row is None else json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if line == self._line:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file.with_name(f".{self.file.name}.lock"), "a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            content = self.file.read_bytes() if self.file.exists() else b""
            before, after = _around(content, self._line)
            with replacing(self.file) as opened:
                opened.write(before + line + after)
        self._line = line

    def leave(self) -> None:
        """Keep what was written; the next row is another one."""
        self._line = b""


def _around(content: bytes, line: bytes) -> tuple[bytes, bytes]:
    """What is before and after the line; all and nothing where it is not there. What is before ends a line."""
    before, found, after = content.rpartition(line) if line else (content, b"", b"")
    if line and not found:
        before, after = content, b""
    return (before if before.endswith(b"\n") or not before else before + b"\n"), after
