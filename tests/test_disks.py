"""A disk that is full or can only be read: one line that names it, and finished results are shown all the same."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError

from smolpost import cli, disks
from smolpost.errors import UserError
from tests.small import Small, call

FULL = "/dev/full"  # a file on a disk without room
MOUNT = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
MOUNTS = shutil.which("unshare") is not None and subprocess.run(MOUNT, capture_output=True).returncode == 0
ONLY_READ = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


def into_json():
    with open(FULL, "w") as file:
        json.dump([0] * 9999, file)


def into_numpy():
    with open(FULL, "wb", buffering=0) as file:
        np.save(file, np.zeros(9999))


def into_arrow():
    table = pa.table({"a": np.zeros(9999)})
    with pa.OSFile(FULL, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def into_torch():
    torch.save({"a": torch.zeros(9999)}, FULL)


def into_torch_file():
    with open(FULL, "wb") as file:
        torch.save({"a": torch.zeros(9999)}, file)


def into_safetensors():
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture
def room(monkeypatch, tmp_path):
    """Free bytes of each place; the test sets them."""
    free = {}
    monkeypatch.setattr(disks, "run_dir", tmp_path / "runs")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for name in ("runs", "scratch", "hub"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free.get(Path(path).name, 1e12)))
    return free


@pytest.mark.parametrize("write", [into_json, into_numpy, into_arrow, into_torch, into_torch_file, into_safetensors])
def test_libraries_name_no_file_so_the_fullest_disk_is_named(room, tmp_path, write):
    with pytest.raises((OSError, RuntimeError, SafetensorError)) as error:
        write()
    for name, setting in (("runs", "run_dir"), ("scratch", "TMPDIR"), ("hub", "HF_HOME")):
        room.clear()
        room[name] = 4096
        assert disks.explained(error.value) == (
            f"no space left on the disk of {tmp_path / name}; free some, or set {setting}=FOLDER elsewhere"
        )


def test_the_file_that_failed_wins_over_a_fuller_disk(room, tmp_path):
    room["runs"] = 0
    file = str(tmp_path / "hub" / "models" / "x")
    line = f"no space left on the disk of {file}; free some, or set HF_HOME=FOLDER elsewhere"
    assert disks.explained(OSError(errno.ENOSPC, "No space left on device", file)) == line
    try:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", file)
        except OSError as error:
            raise RuntimeError("the dataset could not be made") from error
    except RuntimeError as error:
        assert disks.explained(error) == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/data/a.jsonl"), "/data/a.jsonl: Permission denied; give"),
        (OSError(errno.EROFS, "Read-only file system", "/runs/.x.lock"), "/runs/.x.lock: Read-only file system; give"),
        (ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed"), "pip install 'smolpost[deepspeed]'"),
        (ModuleNotFoundError("No module named 'mlx_lm'", name="mlx_lm.utils"), "pip install 'smolpost[export]'"),
        (ModuleNotFoundError("No module named 'mine'", name="mine"), "No module named 'mine'; pip install mine"),
        (ImportError("DeepSpeed is not installed =>\nrun `pip3 install deepspeed`"), "=> run `pip3 install deepspeed`"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_no_repetition_cures_is_one_line_and_exit_code_2(capsys, error, line):
    with pytest.raises(SystemExit) as stop, cli.one_line_errors():
        raise error
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1 and told.startswith("smolpost: ") and line in told


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "x"), ImportError("cannot import name 'x'"), ValueError("x")]
)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), cli.one_line_errors():
        raise error


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    disks.check_writable(tmp_path / "a" / "b", "run_dir=a")
    with pytest.raises(UserError, match=r"run_dir=file: cannot write in .*file \(Not a directory\); give this user"):
        disks.check_writable(tmp_path / "file" / "x", "run_dir=file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(not MOUNTS, reason="this system lets no test mount a disk")
def test_a_finished_run_on_a_read_only_disk_shows_its_results(tmp_path):
    small = Small(tmp_path)
    small.write_data()
    done = small.smolpost("run", "stage=init")
    assert done.returncode == 0, done.stderr

    def read_only(verb, stage):
        command = [sys.executable, "-m", "smolpost.cli", verb, *small.words, f"stage={stage}"]
        return call(["unshare", "-rm", "sh", "-c", ONLY_READ, str(tmp_path), *command])

    again = read_only("run", "init")
    assert again.returncode == 0 and f"results: {tmp_path}" in again.stdout and not again.stderr
    assert read_only("plan", "sft").returncode == 0
    refused = read_only("run", "sft")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr == (
        f"smolpost: run_dir={tmp_path / 'runs'}: cannot write in {tmp_path / 'runs/gsm8k'} (Read-only file system); "
        "give this user the right to it, or set run_dir=FOLDER elsewhere\n"
    )
    refused = read_only("prepare", "sft")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "Read-only file system" in refused.stderr
