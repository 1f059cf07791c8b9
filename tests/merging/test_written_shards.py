"""Streamed shards: any layout of the inputs, the same bytes from any number of threads, readable by safetensors."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from smolpost.files import sha256
from smolpost.merging import shards
from smolpost.merging.average import is_finite
from smolpost.merging.checkpoint import CHUNK, Checkpoint
from smolpost.merging.linear import merge
from smolpost.merging.shards import TASK, plan_shards, write_mean
from tests.merging.checkpoints import mean, save_checkpoint, weights

ROOT = Path(__file__).parent.parent.parent


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=4), st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1
    ),
    st.integers(1, 500),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None)
def test_shards_hold_every_tensor_once_without_gaps(shapes, limit, dtype):
    planned = plan_shards(shapes, dtype, limit)
    assert [name for shard in planned for name in shard.tensors] == sorted(shapes)
    for shard in planned:
        length = int.from_bytes(shard.header[:8], "little")
        assert length % 8 == 0 and len(shard.header) == 8 + length
        end = len(shard.header)
        for name, (start, number) in shard.tensors.items():
            assert (start, number) == (end, torch.Size(shapes[name]).numel())
            end += number * dtype.itemsize
        assert end == shard.size
        assert end - len(shard.header) <= limit or len(shard.tensors) == 1


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two checkpoints whose embedding is longer than a thread's task, one of them in many files."""
    root, size = tmp_path_factory.mktemp("large"), {"vocab_size": TASK // 16 + 4001}
    return save_checkpoint(root / "a", 0, **size), save_checkpoint(root / "b", 1, shard="20KB", **size)


def inputs_of(large):
    return [(name, folder, weight) for name, folder, weight in zip("ab", large, (0.7, 0.3), strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bytes_do_not_depend_on_threads_or_input_shards(dtype, large, tmp_path):
    digests = set()
    for threads in (1, 2, 7):
        merge(inputs_of(large), "a", tmp_path / str(threads), dtype, threads=threads)
        digests.add(sha256(tmp_path / str(threads) / "model.safetensors"))
    resaved = save_checkpoint(tmp_path / "again", 1, vocab_size=TASK // 16 + 4001)
    merge([("a", large[0], 0.7), ("b", resaved, 0.3)], "a", tmp_path / "whole", dtype)
    digests.add(sha256(tmp_path / "whole" / "model.safetensors"))
    assert len(digests) == 1


def test_small_shards_have_an_index_that_transformers_loads(large, tmp_path):
    report = merge(inputs_of(large), "b", tmp_path / "out", "float32", shard_bytes=20_000, verification="full")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) == 3
    assert index["metadata"]["total_size"] == 4 * report["num_parameters"]
    for file in files:
        assert {name for name, place in index["weight_map"].items() if place == file.name} == load_file(file).keys()
    exact = mean([(folder, weight) for _, folder, weight in inputs_of(large)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, values in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            torch.testing.assert_close(values.double(), exact[name], rtol=0, atol=2.4e-7)
    # The pieces are those of the whole.
    merge(inputs_of(large), "b", tmp_path / "whole", "float32")
    torch.testing.assert_close(weights(tmp_path / "out"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_a_sample_holds_elements_of_every_chunk(large, tmp_path):
    report = merge(inputs_of(large), "a", tmp_path / "out", "float32")
    number = report["num_parameters"]
    assert 16 * (number // CHUNK) <= report["num_compared"] < number / 50
    assert report["max_abs_diff"] < 1e-6


def test_manifest_holds_the_hashes_of_all_weight_files(large, tmp_path):
    report = merge(inputs_of(large), "a", tmp_path / "out", "bfloat16")
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["sha256"] == sha256(tmp_path / "out" / "model.safetensors")
    assert [(entry["name"], entry["weight"]) for entry in manifest["inputs"]] == [("a", 0.7), ("b", 0.3)]
    for entry, folder in zip(manifest["inputs"], large, strict=True):
        expected = {file.name: sha256(file) for file in folder.glob("*.safetensors")}
        assert {name: file["sha256"] for name, file in entry["files"].items()} == expected
    assert {key: manifest[key] for key in ("base", "dtype", "num_parameters")} == {
        "base": "a", "dtype": "bfloat16", "num_parameters": report["num_parameters"]
    }  # fmt: skip
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| a | 0.7 |" in card and "| b | 0.3 |" in card
    assert str(tmp_path) not in card + json.dumps(manifest)
    merge(inputs_of(large), "a", tmp_path / "plain", "bfloat16", hash_weights=False)
    manifest = json.loads((tmp_path / "plain" / "merge_manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["sha256"] is None


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_modes_that_the_umask_asks_for(umask, large, tmp_path):
    before = os.umask(umask)
    try:
        merge(inputs_of(large), "a", tmp_path / "out", "float32")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o666 & ~umask}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def anonymous() -> int:
    """Bytes of this process that no file holds."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_memory_is_a_few_chunks_per_thread(tmp_path, monkeypatch):
    folders = [save_checkpoint(tmp_path / name, i, vocab_size=750_000) for i, name in enumerate("ab")]
    checkpoints = [Checkpoint(folder.name, folder, 0.5) for folder in folders]
    seen = []
    monkeypatch.setattr(shards, "is_finite", lambda values: seen.append(anonymous()) or is_finite(values))
    gc.collect()
    before = anonymous()
    write_mean(checkpoints, tmp_path, torch.float32, threads=2)
    assert len(seen) > 90  # chunks of 48 MB
    assert max(seen) - before < 2 * 8 * 4 * CHUNK


# ---------------------------------------------------------------- killed, and a full disk

SLOW_MERGE = """
import sys, time
from pathlib import Path
from smolpost.merging import build, linear
step = sys.argv[4]
def slow(module, name):
    function = getattr(module, name)
    def call(*arguments, **keywords):
        if name == step:
            print("here", flush=True)
            time.sleep(60)
        return function(*arguments, **keywords)
    setattr(module, name, call)
for module, name in ((linear, "compare_with_mean"), (build, "_write_manifest")):
    slow(module, name)
if step == "chunk":
    from smolpost.merging import shards
    from smolpost.merging.average import is_finite
    seen = []
    def slow_chunk(values):
        seen.append(1)
        if len(seen) == 9:
            print("here", flush=True)
            time.sleep(60)
        return is_finite(values)
    shards.is_finite = slow_chunk
a, b, out = map(Path, sys.argv[1:4])
linear.merge([("a", a, 0.7), ("b", b, 0.3)], "a", out, "float32", threads=1)
"""


@pytest.mark.parametrize("step", ["chunk", "compare_with_mean", "_write_manifest"])
def test_killed_merge_leaves_nothing_that_loads(step, large, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW_MERGE, *map(str, large), str(out), step]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        for line in process.stdout:  # libraries print there too
            if line == b"here\n":
                break
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    unfinished = tmp_path / ".out.making" / "out"
    assert list(tmp_path.iterdir()) == [unfinished.parent] and any(unfinished.iterdir())
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(unfinished)
    if step == "chunk":
        assert not list(unfinished.glob("*.safetensors"))
    # The next merge starts afresh.
    merge(inputs_of(large), "a", out, "float32")
    assert list(tmp_path.iterdir()) == [out]


FULL_DISK = """
import shutil, sys
from collections import namedtuple
from pathlib import Path
shutil.disk_usage = lambda path: namedtuple("usage", "free")(10**12)  # another process takes the room afterwards
from smolpost.merging.linear import merge
a, b, out = map(Path, sys.argv[1:4])
try:
    merge([("a", a, 0.7), ("b", b, 0.3)], "a", out, "float32", engine=sys.argv[4])
except OSError as error:
    print("errno", error.errno)
"""


@pytest.mark.parametrize(("size", "engine"), [("4m", "ours"), ("9m", "ours"), ("4m", "mergekit")])
def test_full_disk_leaves_nothing(size, engine, large, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        if size == "9m":  # room for the weights and not for the tokenizer
            (disk / "other").write_bytes(bytes(9 * 2**20 - (large[0] / "model.safetensors").stat().st_size - 2**13))
        command = [sys.executable, "-c", FULL_DISK, *map(str, large), str(disk / "out"), engine]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert "errno 28" in done.stdout, done.stderr
        assert [file.name for file in disk.iterdir() if file.name != "other"] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
