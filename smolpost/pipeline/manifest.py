"""What a finished folder says of itself, and how a folder becomes finished.

A stage's folder is finished when it holds `manifest.json`, which is written last and atomically. Folders that are
made in one go are built beside their place and renamed into it; folders that can be resumed (training, pairs) grow in
place and get their manifest at the end.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from smolpost.errors import UserError
from smolpost.files import MANIFEST, hashes, stamp, write_json
from smolpost.pipeline.code import versions


def digest(value: object) -> str:
    """12 hex digits of the SHA-256 of a JSON-able value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(folder: Path) -> dict | None:
    """The folder's manifest, or None where it has none: the folder is unfinished.

    Raises:
        UserError: The file is there and cannot be read as a manifest.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text())
        manifest["key"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not a manifest; remove {folder} and run its stage again") from None
    return manifest


def write(folder: Path, files: dict[str, dict] | None = None, **fields) -> dict:
    """Finish the folder: the manifest is complete on disk or not there at all.

    Args:
        files: `hashes` of the folder, where they are known.
    """
    files = hashes(folder) if files is None else files
    manifest = {
        **fields,
        "files": files,
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    stamp(folder, files)
    write_json(folder / MANIFEST, manifest)
    return manifest


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends well, and vanishes when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}.part-*"):  # of builds that were killed; the caller holds the lock
        shutil.rmtree(stale)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.part-"))
    os.chmod(part, 0o755)
    try:
        yield part
        if folder.exists():  # without a manifest, or the caller would not have come here
            shutil.rmtree(folder)
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Be the only process that makes `folder`; the kernel frees the lock of a process that dies.

    A run that was killed may leave its training process alive: the next run waits for it and says so.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(f"waiting for process {file.read().strip() or '?'}, which is making {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
