"""One process makes a folder; what a killed one left is gone; what is finished stays what was written."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smolpost import files
from smolpost.errors import UserError
from smolpost.files import hashes, stamp, verify, workplace, write_json

ROOT = Path(__file__).resolve().parent.parent
HELD = """
import sys, time
from pathlib import Path
from smolpost.files import workplace
with workplace(Path(sys.argv[1])) as work:
    (work / "half").write_text("written")
    (work / "folder").mkdir()
    print("here", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HELD, str(out)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"here\n"
        with pytest.raises(UserError, match=f"another process is making {out}"), workplace(out):
            pass
        assert (tmp_path / ".out.making" / "half").read_text() == "written"
        os.kill(process.pid, signal.SIGKILL)
    with workplace(out) as work:
        assert list(work.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), workplace(tmp_path / "new" / "deep" / "out") as work:
        (work / "part").write_text("x")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_the_folders_above_a_result_stay(tmp_path):
    out = tmp_path / "new" / "deep" / "out"
    with workplace(out) as work:
        (work / "out").mkdir()
        (work / "out").rename(out)
    assert list(out.parent.iterdir()) == [out]


@pytest.fixture
def finished(tmp_path):
    """A folder with a manifest of two files, just written."""
    folder = tmp_path / "sft"
    (folder / "snapshots").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "snapshots" / "config.json").write_text("{}")
    (folder / "README.md").write_text("a card, which nothing reads back")
    (folder / "runs").mkdir()
    (folder / "runs" / "events").write_text("a log")
    found = hashes(folder)
    assert list(found) == ["model.safetensors", "snapshots/config.json"]
    assert found["model.safetensors"] == {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7}
    stamp(folder, found)
    write_json(folder / "manifest.json", {"key": "k", "files": found})
    return folder


def test_files_that_are_as_they_were_written_are_not_read(finished, monkeypatch):
    monkeypatch.setattr("smolpost.files.sha256", lambda file: pytest.fail(f"{file} was read"))
    verify(finished)
    (finished / "README.md").write_text("another card")
    verify(finished)


def test_a_copy_is_read_once(finished, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("smolpost.files.sha256", lambda file, own=files.sha256: read.append(file.name) or own(file))
    shutil.copytree(finished, tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
    verify(tmp_path / "copy")
    verify(tmp_path / "copy")
    assert read == ["model.safetensors", "config.json"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda file: file.write_bytes(b"Weights"), "is not the file that was written: its size or SHA-256"),
        (lambda file: file.write_bytes(b"weight"), "is not the file that was written"),
        (lambda file: file.unlink(), "is missing, which manifest.json lists"),
    ],
)
def test_changed_files_of_a_finished_folder_are_refused(finished, change, text):
    change(finished / "model.safetensors")
    for _ in range(2):  # refused again, too
        with pytest.raises(UserError, match=text):
            verify(finished)


def test_the_remedy_for_a_meant_change_works(finished, tmp_path):
    (finished / "model.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="copy the folder elsewhere without its manifest"):
        verify(finished)
    shutil.copytree(finished, tmp_path / "mine", ignore=shutil.ignore_patterns("manifest.json"))
    verify(tmp_path / "mine")
