"""Files and folders that are there whole or not at all."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from smolpost.errors import UserError


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
