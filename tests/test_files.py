"""One process makes a folder; what a killed one left is gone; what is finished stays what was written."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from smolpost import files
from smolpost.errors import UserError
from smolpost.files import (
    CLOCK_GRAIN,
    Hashes,
    building,
    digest,
    hashes,
    lock,
    remove_parts,
    replacing,
    stamp,
    verify,
    workplace,
    write_json,
)

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


def test_digest_ignores_the_order_of_keys_and_nothing_else():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest([1, 2]) != digest([2, 1])
    assert len(digest(None)) == 12


def test_building_shows_the_folder_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), building(tmp_path / "out") as part:
        (part / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with building(tmp_path / "out") as part:
        (part / "whole").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]


def test_a_build_that_was_killed_leaves_nothing_behind(tmp_path):
    killed = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from smolpost.files import CLOCK_GRAIN, Hashes, building, lock
        with building(Path({str(tmp_path / "out")!r})) as part:
            (part / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    code = subprocess.run([sys.executable, "-c", killed]).returncode
    assert code == -signal.SIGKILL and not (tmp_path / "out").exists()
    with building(tmp_path / "out") as part:
        (part / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_lock_waits_for_its_holder_and_says_so(tmp_path):
    wait = textwrap.dedent(
        f"""
        from pathlib import Path
        from smolpost.files import CLOCK_GRAIN, Hashes, building, lock
        with lock(Path({str(tmp_path / "out")!r})):
            print("mine", flush=True)
        """
    )
    with lock(tmp_path / "out"):
        other = subprocess.Popen([sys.executable, "-c", wait], stdout=subprocess.PIPE, text=True)
        assert f"waiting for process {os.getpid()}" in other.stdout.readline()
    assert other.communicate(timeout=20)[0] == "mine\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "rows"
    with replacing(file) as part:
        part.write(b"old")
        assert not file.exists()
    with pytest.raises(OSError, match="full"), replacing(file) as part:
        part.write(b"half of the ne")
        raise OSError("disk full")
    assert file.read_bytes() == b"old" and list(file.parent.iterdir()) == [file]


def test_parts_of_killed_writers_are_removed_by_name(tmp_path):
    kept = [tmp_path / name for name in ("rows", ".rows.lock", ".other.part-2")]
    for path in kept[:2]:
        path.touch()
    kept[2].mkdir()
    (tmp_path / ".rows.part-3").touch()
    (tmp_path / ".rows.part-4" / "deep").mkdir(parents=True)
    remove_parts(tmp_path, ["rows"])
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    remove_parts(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept[:2])


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_are_those_that_the_umask_asks_for(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "file", 1)
        with building(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


# ---------------------------------------------------------------- contents that are read once


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that were read, in order."""
    read = []
    monkeypatch.setattr("smolpost.files.sha256", lambda file, own=files.sha256: read.append(file.name) or own(file))
    return read


@pytest.fixture
def clock(monkeypatch):
    """The time of hashing is `clock.ahead` ns after the real one: by default long after every change."""
    now = time.time_ns

    class Clock:
        ahead = 2 * CLOCK_GRAIN

    monkeypatch.setattr("smolpost.files.time.time_ns", lambda: now() + Clock.ahead)
    return Clock


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def hashed_again(cache: Path, file: Path) -> str:
    """By another command."""
    hashes = Hashes(cache)
    found = hashes(file)
    hashes.save()
    return found


def test_a_content_is_read_once_by_all_commands(tmp_path, reads, clock):
    (file := tmp_path / "rows").write_bytes(b"one")
    for _ in range(3):
        assert hashed_again(tmp_path / "run" / "hashes.json", file) == sha(b"one")
    assert reads == ["rows"]
    assert hashed_again(tmp_path / "other_run.json", file) == sha(b"one") and len(reads) == 2


def rewrite(file):
    file.write_bytes(b"two")


def rewrite_with_its_old_time(file):
    old = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))


def put_another_in_its_place(file):
    (file.parent / "new").write_bytes(b"two")
    shutil.copystat(file, file.parent / "new")
    (file.parent / "new").replace(file)


def point_elsewhere(file):
    (file.parent / "target").write_bytes(b"two")
    file.unlink()
    file.symlink_to("target")


@pytest.mark.parametrize("change", [rewrite, rewrite_with_its_old_time, put_another_in_its_place, point_elsewhere])
def test_a_changed_file_is_read_again(tmp_path, clock, change):
    (file := tmp_path / "rows").write_bytes(b"one")  # both contents have three bytes
    assert hashed_again(tmp_path / "hashes.json", file) == sha(b"one")
    change(file)
    assert hashed_again(tmp_path / "hashes.json", file) == sha(b"two")


def test_a_file_that_changed_just_before_is_not_kept(tmp_path, reads, clock):
    """The next change could come within one tick of the file system's clock and leave the same times."""
    clock.ahead = 0
    (file := tmp_path / "rows").write_bytes(b"one")
    for _ in range(2):
        hashed_again(tmp_path / "hashes.json", file)
    assert reads == ["rows", "rows"] and not (tmp_path / "hashes.json").exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch, clock):
    (file := tmp_path / "rows").write_bytes(b"one")

    def slow(file, own=files.sha256):
        found = own(file)
        file.write_bytes(b"two")
        return found

    with monkeypatch.context() as patched:
        patched.setattr("smolpost.files.sha256", slow)
        hashed_again(tmp_path / "hashes.json", file)
    assert hashed_again(tmp_path / "hashes.json", file) == sha(b"two")


def test_two_commands_keep_what_each_has_read(tmp_path, reads, clock):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    first, second = (Hashes(tmp_path / "hashes.json") for _ in range(2))
    first(tmp_path / "a"), second(tmp_path / "b")
    first.save(), second.save()
    third = Hashes(tmp_path / "hashes.json")
    assert (third(tmp_path / "a"), third(tmp_path / "b")) == (sha(b"a"), sha(b"b")) and reads == ["a", "b"]


@pytest.mark.parametrize("content", ["", "[]", '{"md5": {}}', '{"sha256'])
def test_a_cache_that_says_nothing_is_made_again(tmp_path, reads, clock, content):
    (file := tmp_path / "rows").write_bytes(b"one")
    (tmp_path / "hashes.json").write_text(content)
    for _ in range(2):
        assert hashed_again(tmp_path / "hashes.json", file) == sha(b"one")
    assert reads == ["rows"]


def test_a_disk_that_cannot_be_written_only_costs_time(tmp_path, reads, clock):
    (file := tmp_path / "rows").write_bytes(b"one")
    for _ in range(2):  # the folder of the cache is a file
        assert hashed_again(file / "hashes.json", file) == sha(b"one")
    assert reads == ["rows", "rows"]
