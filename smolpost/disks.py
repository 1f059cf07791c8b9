"""Disks that cannot be written: found before the work begins, and named if a write fails later."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from smolpost.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# What safetensors, torch, numpy and tempfile say of a full disk, without its number and without the file.
SAY_FULL = re.compile(
    r"No space left on device|unexpected pos \d+ vs \d+|\d+ requested and \d+ written|No usable temporary directory"
)

run_dir: Path | None = None  # the folder of this process's pipeline, once its recipe is read


def is_writable(folder: Path) -> bool:
    """Whether files can be created in the folder, or in the folder above if it does not exist; also on a full disk."""
    return os.access(_existing(folder), os.W_OK | os.X_OK)


def check_writable(folder: Path, setting: str) -> None:
    """Refuse a folder in which no file can be created; for one that does not exist, its nearest existing parent.

    Args:
        setting: The words that chose it, for the message.
    Raises:
        UserError: No file can be created there.
    """
    place = _existing(folder)
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UserError(
            f"{setting}: cannot write in {place} ({error.strerror}); give this user the right to it, or set "
            "run_dir=FOLDER elsewhere"
        ) from error


def explained(error: BaseException) -> str | None:
    """One line for an error that a disk caused, with the disk and the remedy; None for other errors."""
    for link in (error, error.__cause__):
        if isinstance(link, OSError) and link.errno in REFUSED and link.filename:
            return f"{link.filename}: {link.strerror}; give this user the right to it, or name another place"
    full = [link for link in _chain(error) if getattr(link, "errno", None) in FULL or SAY_FULL.search(str(link))]
    if not full:
        return None
    file = next((link.filename for link in full if isinstance(link, OSError) and link.filename), None)
    place, remedy = _full_place(Path(os.fsdecode(file)) if file else None)
    return f"no space left on the disk of {place}; free some, or {remedy}"


def _full_place(file: Path | None) -> tuple[Path, str]:
    """The file's, or where the error names none, that with the least room of all places that a run writes to."""
    places = {
        Path(os.environ.get("TMPDIR", "/tmp")): "set TMPDIR=FOLDER elsewhere",
        Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser(): "set HF_HOME=FOLDER elsewhere",
        Path.cwd(): "work in another folder",
    }
    if run_dir:  # the first of several on one disk
        places = {run_dir: "set run_dir=FOLDER elsewhere"} | places
    if file is None:
        return min(places.items(), key=lambda item: shutil.disk_usage(_existing(item[0])).free)
    above = [place for place in places if file.absolute().is_relative_to(place.absolute())]
    return file, places[max(above, key=lambda place: len(place.parts))] if above else "name another folder"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest existing folder above it."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
