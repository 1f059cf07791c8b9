"""Locks that killed builds have left: torch would wait for the end of such a build for ever, without a word."""

import contextlib
import fcntl
import os
from pathlib import Path

import psutil


def remove_stale() -> list[Path]:
    """Remove this user's locks of torch's C++ builds, DeepSpeed's among them, that no process has open; the removed.

    A building process makes the file, keeps it open and removes it at its end. One that nobody on this machine has
    open is of a process that was killed.
    """
    from torch.utils.cpp_extension import get_default_build_root  # slow, and few need it

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]  # there, or below a folder per python and accelerator
    if not locks:
        return []
    with open(root / ".stale", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # one rank at a time: by then the lock of another rank's new build is open
        stale = [lock for lock in locks if lock.exists() and lock.stat().st_uid == os.getuid() and not is_open(lock)]
        for lock in stale:
            lock.unlink(missing_ok=True)
    return stale


def is_open(file: Path) -> bool:
    """Whether a process of this user has the file open."""
    place = os.path.realpath(file)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # of another user, or gone
            if any(opened.path == place for opened in process.open_files()):
                return True
    return False
