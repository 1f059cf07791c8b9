"""The lock of a build that was killed goes; that of a build that runs stays."""

import pytest
from torch.utils.file_baton import FileBaton

from smolpost.training import build_locks


@pytest.mark.parametrize("below", ["", "py311_cpu"], ids=["a folder of one's own", "torch's own folder"])
def test_only_locks_that_nobody_holds_are_removed(tmp_path, monkeypatch, below):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert build_locks.remove_stale() == []
    for name in ("running", "killed"):
        (tmp_path / below / name).mkdir(parents=True)
    killed, running = (tmp_path / below / name / "lock" for name in ("killed", "running"))
    killed.touch()
    baton = FileBaton(str(running))
    assert baton.try_acquire()
    assert build_locks.remove_stale() == [killed]
    assert running.exists() and not killed.exists()
    baton.release()
    assert FileBaton(str(killed)).try_acquire()  # so the next build begins
