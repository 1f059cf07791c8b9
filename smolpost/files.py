"""Files and folders that are there whole or not at all, and that stay what was written."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from smolpost.errors import UserError

MANIFEST = "manifest.json"  # of a finished folder
STAMPS = ".verified.json"  # beside it: file -> [bytes, time of change] at which its hash was right
# Parts of a finished folder that nothing reads back, or that go when it is finished.
_UNREAD = ("checkpoint-*", "runs", "*.md", "*.png", "*.svg", ".*", MANIFEST)


def write_json(file: Path, value: object) -> None:
    """Replace the file in one step, so a reader sees the old content or the new, never half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as part:
        try:
            json.dump(value, part, indent=2)
            part.write("\n")
            part.flush()
            os.fsync(part.fileno())
            os.chmod(part.name, 0o644)
            os.replace(part.name, file)
        except BaseException:
            os.unlink(part.name)
            raise


def sha256(file: Path) -> str:
    """Of the content, in hex."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, dict]:
    """Path in the folder -> {"sha256", "bytes"} of every file that a reader of the finished folder may read."""
    found = {}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if file.is_file() and not any(fnmatch(part, pattern) for part in path.parts for pattern in _UNREAD):
            found[str(path)] = {"sha256": sha256(file), "bytes": file.stat().st_size}
    return found


def stamp(folder: Path, names: Iterable[str]) -> None:
    """Note that these files are right as they lie there, so that `verify` need not read them."""
    stamps = {name: _stamp(folder / name) for name in names}
    with contextlib.suppress(OSError):  # a disk that cannot be written: they are read the next time, too
        write_json(folder / STAMPS, stamps)


def verify(folder: Path) -> None:
    """Refuse a finished folder whose files are not those that were written; other folders pass.

    A file with the size and time of change at which its hash was right is not read again.

    Raises:
        UserError: A file is missing or another one.
    """
    recorded = _recorded(folder)
    stamps = _read_object(folder / STAMPS)
    unknown = []
    for name, entry in recorded.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing, which {MANIFEST} lists; {_remedy(folder)}")
        if stamps.get(name) == _stamp(file):
            continue
        if file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
            raise UserError(
                f"{file} is not the file that was written: its size or SHA-256 is not that of the manifest; "
                f"{_remedy(folder)}"
            )
        unknown.append(name)
    if unknown:
        stamp(folder, recorded)


def _recorded(folder: Path) -> dict[str, dict]:
    """The hashed files of a finished stage, an adopted checkpoint or a merge."""
    for name in (MANIFEST, "merge_manifest.json"):
        files = _read_object(folder / name).get("files", {})
        if hashed := {path: entry for path, entry in files.items() if entry["sha256"]}:
            return hashed
    return {}


def _read_object(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or one that says nothing
        return {}


def _stamp(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _remedy(folder: Path) -> str:
    return (
        f"put the file back from a copy, or remove {folder} and make it again; where the change is meant, copy the "
        "folder elsewhere without its manifest and use that as a checkpoint of its own"
    )


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out`, for the one process that makes it; gone when the block ends, however.

    So are the folders above it that were made for it, where nothing was put into them.

    What a killed process left in it is removed first; the kernel freed its lock.

    Raises:
        UserError: Another process is making `out`.
    """
    out = Path(os.path.abspath(out))
    work = out.parent / f".{out.name}.making"
    new = [parent for parent in work.parents if not parent.exists()]  # the deepest first
    work.mkdir(parents=True, exist_ok=True)
    held = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed = os.stat(work).st_ino != os.fstat(held).st_ino  # by a process that ended just now
        except (BlockingIOError, FileNotFoundError):
            removed = True
        if removed:
            raise UserError(f"another process is making {out}; wait for its end, or name another folder")
        try:
            _empty(work)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):  # one that holds the result stays
                for parent in new:
                    parent.rmdir()
    finally:
        os.close(held)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
