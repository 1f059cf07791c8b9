"""Files and folders that are there whole or not at all, and that stay what was written.

Everything is written under a hidden name `.NAME.part-...` beside its place and takes it in one rename. All have the
modes that the umask asks for.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from smolpost.errors import UserError

MANIFEST = "manifest.json"  # of a finished folder
STAMPS = ".verified.json"  # beside it: file -> [bytes, time of change] at which its hash was right
# Parts of a finished folder that nothing reads back, or that go when it is finished.
_UNREAD = ("checkpoint-*", "runs", "*.md", "*.png", "*.svg", ".*", MANIFEST)
_PART = ".part-"
CLOCK_GRAIN = 2 * 10**9  # ns; of the times that file systems keep: FAT's, the coarsest


# ---------------------------------------------------------------- whole or absent


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the place of `file` when the block ends well, and vanishes otherwise.

    A reader sees the old content or the new, never half. The content is on the disk before it takes its place.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = _part(file)
    try:
        with open(part, "xb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_bytes(file: Path, content: bytes) -> None:
    with replacing(file) as opened:
        opened.write(content)


def write_text(file: Path, text: str) -> None:
    """As UTF-8."""
    write_bytes(file, text.encode())


def write_json(file: Path, value: object) -> None:
    """With an indent of two spaces and a last line break.

    Raises:
        TypeError: The value is not JSON; the file stays as it was.
    """
    write_text(file, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    What killed builds of `folder` left is removed first: the caller holds its `lock`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(folder.parent, [folder.name])
    part = _part(folder)
    part.mkdir()
    try:
        yield part
        put(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def put(made: Path, folder: Path) -> None:
    """Rename a folder that is complete to its place; an unfinished one that lies there goes."""
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(made, folder)


def remove_parts(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove what killed writers left of files and folders in `folder`: of those with these names, or of all.

    No writer of them may be alive.
    """
    for path in list(folder.iterdir()):
        name, mark, _ = path.name.rpartition(_PART)
        if mark and name.startswith(".") and (names is None or name[1:] in names):
            _remove(path)


def link(file: Path, place: Path) -> None:
    """Put a file at a second place without a second copy on the disk; on another disk it is copied."""
    file = file.resolve()  # the Hub's cache has links to its files
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def sync(*paths: Path) -> None:
    """Bring files' contents and folders' names to the disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _part(place: Path) -> Path:
    return place.with_name(f".{place.name}{_PART}{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- one process at a time


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
            for path in list(work.iterdir()):
                _remove(path)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):  # one that holds the result stays
                for parent in new:
                    parent.rmdir()
    finally:
        os.close(held)


# ---------------------------------------------------------------- content


def sha256(file: Path) -> str:
    """Of the content, in hex."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class Hashes:
    """SHA-256 of files by their paths, kept in a file, so that a content is read once and not by every command.

    A kept hash stands for a file with the device, inode, size and times of change at which its content was read. That
    of a file which changed just before it was read is not kept: a second change within the clock's grain would leave
    the same times.

        hashes = Hashes(run_folder / "hashes.json")
        hashes(file)

    Args:
        file: Where the hashes are kept; need not be there. Several processes may use one: a content that two of them
            ask for is read by the first and found by the second.
    """

    def __init__(self, file: Path):
        self.file = file
        self._known = self._saved()

    def __call__(self, file: Path) -> str:
        """SHA-256 of the file's content, in hex."""
        place, identity = os.path.abspath(file), _identity(file)
        *known, found = self._known.get(place, [None])
        if known == identity:
            return found
        with self._alone():  # the ranks of a training all come here at once: one reads, the others find what it kept
            self._known |= self._saved()
            *known, found = self._known.get(place, [None])
            if known != identity:
                now, found = time.time_ns(), sha256(file)
                if _identity(file) == identity and now - max(identity[-2:]) > CLOCK_GRAIN:
                    self._known[place] = [*identity, found]
                    with contextlib.suppress(OSError):  # a disk that cannot be written: it is read the next time, too
                        write_json(self.file, {"sha256": self._known})
        return found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time, where the disk can be written."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            held = open(self.file.with_name(f".{self.file.name}.lock"), "a")  # noqa: SIM115
        except OSError:
            yield
            return
        with held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield

    def _saved(self) -> dict[str, list]:
        """Path -> [*_identity, SHA-256]."""
        return read_json(self.file).get("sha256", {})


def _identity(file: Path) -> list[int]:
    """Device, inode, size and, in nanoseconds, the times of the last change of content and of attributes."""
    found = os.stat(file)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def digest(value: object, digits: int = 12) -> str:
    """The first hex digits of the SHA-256 of a JSON-able value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def hashes(folder: Path) -> dict[str, dict]:
    """`hashed` of every file that a reader of the finished folder may read."""

    def is_read(path: Path) -> bool:
        return not any(fnmatch(part, pattern) for part in path.relative_to(folder).parts for pattern in _UNREAD)

    return hashed((file for file in sorted(folder.rglob("*")) if file.is_file() and is_read(file)), folder)


def hashed(files: Iterable[Path], folder: Path) -> dict[str, dict]:
    """Path in the folder -> {"sha256", "bytes"} of each file."""
    return {str(f.relative_to(folder)): {"sha256": sha256(f), "bytes": f.stat().st_size} for f in files}


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
    stamps = read_json(folder / STAMPS)
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
        files = read_json(folder / name).get("files", {})
        if hashed := {path: entry for path, entry in files.items() if entry["sha256"]}:
            return hashed
    return {}


def read_json(file: Path) -> dict:
    """A JSON object; {} where the file is not there or holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stamp(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _remedy(folder: Path) -> str:
    return (
        f"put the file back from a copy, or remove {folder} and make it again; where the change is meant, copy the "
        "folder elsewhere without its manifest and use that as a checkpoint of its own"
    )
