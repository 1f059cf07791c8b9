"""The reference cache: exact, resumable after kill -9, and never wrong in silence."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from smolpost.errors import UserError
from smolpost.training import reference_cache
from smolpost.training.reference_cache import ReferenceCache, reference_key, weights_hash

SMALL = 64  # scored tokens per chunk in these tests
COUNTS = np.random.default_rng(0).integers(1, 40, size=300)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference_cache, "CHUNK_TOKENS", SMALL)


def logps_of(pair: int) -> np.ndarray:
    return -10 * np.random.default_rng(pair).random(COUNTS[pair], dtype=np.float32)


def chunk_of(cache: ReferenceCache, chunk: int) -> list[np.ndarray]:
    return [logps_of(pair) for pair in cache.pairs_of(chunk)]


def fill(folder, rank=0, world_size=1, stop_in=None, seconds=0.0):
    """What a rank does; in a process of its own every write may take `seconds`, and that of `stop_in` hangs."""
    reference_cache.CHUNK_TOKENS = SMALL
    fsync = os.fsync
    if seconds:
        os.fsync = lambda file: (fsync(file), time.sleep(seconds))
    cache = ReferenceCache(Path(folder), "key", COUNTS)
    missing = cache.missing()
    print("missing", *missing, flush=True)
    for chunk in missing:
        if chunk % world_size == rank:
            if chunk == stop_in:
                os.fsync = lambda _: (print("inside", flush=True), time.sleep(600))
            cache.write(chunk, chunk_of(cache, chunk))


def start(folder, *args) -> subprocess.Popen:
    code = f"from tests.training.test_reference_cache import fill; fill({str(folder)!r}, *{args})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def finished(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.glob("logps-*.safetensors"))


def assert_whole(folder: Path):
    cache = ReferenceCache(folder, "key", COUNTS)
    cache.open()
    for pair in range(len(COUNTS)):
        np.testing.assert_array_equal(cache.read(pair), logps_of(pair), strict=True)
    assert sorted(f.name for f in folder.iterdir()) == finished(folder), "a part of a killed writer is left"


@pytest.fixture
def whole(tmp_path) -> ReferenceCache:
    fill(tmp_path / "cache")
    return ReferenceCache(tmp_path / "cache", "key", COUNTS)


# ---------------------------------------------------------------- chunks


def test_chunks_match_hand_value():
    """Pairs start at 0, 60, 63 | 64 | 200 | 260, 260: in the windows 0, 1, 3 and 4 of 64 tokens."""
    cache = ReferenceCache(Path("unused"), "key", np.array([60, 3, 1, 136, 60, 0, 5]))
    assert [list(cache.pairs_of(c)) for c in range(cache.num_chunks)] == [[0, 1, 2], [3], [4], [5, 6]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), max_size=60))
def test_chunks_cover_all_pairs_in_order_and_stay_small(counts):
    counts = np.array(counts, dtype=np.int64)
    cache = ReferenceCache(Path("unused"), "key", counts)
    chunks = [cache.pairs_of(c) for c in range(cache.num_chunks)]
    assert [pair for chunk in chunks for pair in chunk] == list(range(len(counts)))
    for chunk in chunks:
        assert len(chunk) >= 1
        assert counts[chunk.start : chunk.stop - 1].sum() < SMALL + 1  # without its last pair: within one window
    again = ReferenceCache(Path("unused"), "other", counts.astype(np.uint16))
    assert [again.pairs_of(c) for c in range(again.num_chunks)] == chunks


def test_roundtrip_is_exact(whole):
    assert whole.num_chunks > 50 and whole.missing() == []
    assert_whole(whole.folder)


def test_one_row_of_values_is_the_same_file(whole, tmp_path):
    other = ReferenceCache(tmp_path / "other", "key", COUNTS)
    other.write(3, np.concatenate(chunk_of(other, 3)))
    name = "logps-00003.safetensors"
    stored = [load_file(folder / name)["logps"] for folder in (whole.folder, other.folder)]
    np.testing.assert_array_equal(*stored, strict=True)
    assert stored[0].dtype == np.float32 and (other.folder / name).stat().st_mode & 0o777 == 0o644


def test_pairs_without_tokens_and_no_pairs(tmp_path):
    cache = ReferenceCache(tmp_path / "a", "key", np.array([SMALL, 0, 0]))  # the second chunk holds no value
    cache.write(0, [np.full(SMALL, -1.5)])
    cache.write(1, [np.zeros(0), np.zeros(0)])
    cache.open()
    assert [len(cache.read(pair)) for pair in range(3)] == [SMALL, 0, 0]
    empty = ReferenceCache(tmp_path / "b", "key", np.zeros(0, dtype=np.int64))
    empty.open()
    assert empty.num_chunks == 0 and empty.missing() == []


def test_what_read_gives_is_the_readers_own(whole):
    whole.open()
    first = whole.read(7)
    first[:] = 0
    np.testing.assert_array_equal(whole.read(7), logps_of(7))


def test_a_reader_keeps_what_it_opened(whole):
    """A chunk is replaced in one step, never written over."""
    whole.open()
    pairs = whole.pairs_of(2)
    ReferenceCache(whole.folder, "key", COUNTS).write(2, [np.zeros(COUNTS[pair]) for pair in pairs])
    for pair in pairs:
        np.testing.assert_array_equal(whole.read(pair), logps_of(pair))


# ---------------------------------------------------------------- kills, ranks


def test_killed_inside_a_write(tmp_path):
    """kill -9 with the fourth chunk half written: three are used again, the rest is missing, the part is swept."""
    process = start(tmp_path, 0, 1, 3)
    assert process.stdout.readline().startswith("missing 0 1 2 3 ")
    assert process.stdout.readline() == "inside\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    part = [f.name for f in tmp_path.iterdir() if f.name not in finished(tmp_path)]
    assert len(part) == 1 and part[0].startswith(".logps-00003.safetensors.")
    stamps = {f: (tmp_path / f).stat().st_mtime_ns for f in finished(tmp_path)}
    cache = ReferenceCache(tmp_path, "key", COUNTS)
    assert cache.missing() == list(range(3, cache.num_chunks))
    fill(tmp_path)
    assert_whole(tmp_path)
    assert stamps == {f: (tmp_path / f).stat().st_mtime_ns for f in stamps}


def test_killed_at_any_moment(tmp_path):
    """Killed again and again, the cache gets whole without a finished chunk being written twice."""
    draw, stamps = random.Random(0), {}
    for _ in range(4):
        process = start(tmp_path, 0, 1, None, 0.005)
        process.stdout.readline()
        goal, limit = len(stamps) + draw.randint(5, 15), time.monotonic() + 60
        while len(finished(tmp_path)) < goal:
            assert time.monotonic() < limit
            time.sleep(draw.random() / 100)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        there = {f: (tmp_path / f).stat().st_mtime_ns for f in finished(tmp_path)}
        assert stamps.items() <= there.items() and len(there) >= goal
        cache = ReferenceCache(tmp_path, "key", COUNTS)
        assert len(cache.missing()) == cache.num_chunks - len(there)
        assert finished(tmp_path) == sorted(there)
        stamps = there
    fill(tmp_path)
    assert stamps.items() <= {f: (tmp_path / f).stat().st_mtime_ns for f in finished(tmp_path)}.items()
    assert_whole(tmp_path)


def test_two_ranks_write_at_once(tmp_path):
    ranks = [start(tmp_path, rank, 2, None, 0.003) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert_whole(tmp_path)


def test_two_runs_write_the_same_chunks_at_once(tmp_path):
    """Two seeds that start together: the work is done twice, the cache is whole."""
    runs = [start(tmp_path, 0, 1, None, 0.003) for _ in range(2)]
    assert [run.wait(120) for run in runs] == [0, 0]
    assert_whole(tmp_path)


def test_slow_twin_whose_part_was_swept(whole, monkeypatch):
    """The other run finishes the chunk, and sweeps our part, just before we put it in place."""
    fsync = os.fsync

    def swept_meanwhile(descriptor):
        fsync(descriptor)
        monkeypatch.setattr(os, "fsync", fsync)
        assert whole.missing() == []

    monkeypatch.setattr(os, "fsync", swept_meanwhile)
    whole.write(2, chunk_of(whole, 2))
    assert_whole(whole.folder)


def test_full_disk_leaves_nothing(whole, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    file = whole.folder / "logps-00002.safetensors"
    file.unlink()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        whole.write(2, chunk_of(whole, 2))
    assert sorted(f.name for f in whole.folder.iterdir()) == finished(whole.folder)
    assert whole.missing() == [2]


# ---------------------------------------------------------------- damage


def nan_inside(file):
    """A file that is right in everything but one value: what other code, or a disk before the checksum, might write."""
    cache = ReferenceCache(file.parent, "key", COUNTS)
    values = np.concatenate(chunk_of(cache, 2))
    values[5] = np.nan
    label = cache._label(2) | {"crc32": f"{reference_cache.zlib.crc32(values):08x}"}
    save_file({"logps": values}, file, metadata=label)


def written_by(key="key", counts=COUNTS):
    def damage(file):
        cache = ReferenceCache(file.parent, key, counts)
        cache.write(2, [np.full(counts[pair], -1.0) for pair in cache.pairs_of(2)])

    return damage


def layout_of_others(file):
    """The same pairs, and as many values in all, which fall to the pairs in another way."""
    pairs = ReferenceCache(file.parent, "key", COUNTS).pairs_of(2)
    counts = COUNTS.copy()
    counts[pairs.start], counts[pairs.start + 1] = COUNTS[pairs.start] - 1, COUNTS[pairs.start + 1] + 1
    assert ReferenceCache(file.parent, "key", counts).pairs_of(2) == pairs
    written_by(counts=counts)(file)


def cut(share):
    return lambda file: os.truncate(file, int(share * file.stat().st_size))


def flipped(place):
    def damage(file):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)

    return damage


DAMAGES = {
    "truncated": (cut(0.9), "not a complete safetensors file"),
    "header cut": (cut(0.1), "not a complete safetensors file"),
    "empty": (cut(0), "not a complete safetensors file"),
    "garbage": (lambda file: file.write_bytes(random.Random(0).randbytes(5000)), "not a complete safetensors file"),
    "bytes added": (lambda file: file.write_bytes(file.read_bytes() + b"\0\0\0\0"), "not a complete safetensors file"),
    "data flipped": (flipped(-7), "do not have the checksum"),
    "other key": (written_by(key="other"), "its key is other where key belongs"),
    "other layout": (layout_of_others, "its layout is"),
    "other range": (written_by(counts=COUNTS[::-1].copy()), "its pairs is"),
    "not finite": (nan_inside, "a value is not finite"),
    "other tensor": (lambda file: save_file({"x": np.zeros(9, "f4")}, file), "not a complete safetensors file"),
    "unlabelled": (lambda file: save_file({"logps": np.zeros(9, "f4")}, file), "its key is None"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_reported_and_mended(whole, capsys, kind):
    damage, why = DAMAGES[kind]
    file = whole.folder / "logps-00002.safetensors"
    damage(file)
    with pytest.raises(UserError, match=rf"lacks 1 of {whole.num_chunks} chunks, the first is {file.name}; run the"):
        whole.open()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and re.fullmatch(rf"deleted {file}: .*{why}.*; it will be computed again", lines[0])
    assert not file.exists() and whole.missing() == [2]
    assert capsys.readouterr().out == ""
    fill(whole.folder)
    assert_whole(whole.folder)


@pytest.mark.parametrize(
    "tensors",
    [{"logps": "f8"}, {"logps": "u4"}, {"logps": "f4", "more": "f4"}],
    ids=["fp64", "integers", "two tensors"],
)
def test_other_contents_under_a_right_label(whole, capsys, tensors):
    number = sum(COUNTS[pair] for pair in whole.pairs_of(2))
    content = {name: np.zeros(number, dtype) for name, dtype in tensors.items()}
    save_file(content, whole.folder / "logps-00002.safetensors", metadata=whole._label(2))
    assert whole.missing() == [2]
    assert "where (['logps'], 'F32', [" in capsys.readouterr().out


def test_every_flipped_byte_is_found(tmp_path):
    """Of a whole file, header and values: no flip passes, and none raises."""
    cache = ReferenceCache(tmp_path, "key", COUNTS[:2])
    cache.write(0, chunk_of(cache, 0))
    file = tmp_path / "logps-00000.safetensors"
    content = file.read_bytes()
    for place in range(len(content)):
        for bit in (0, 5):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            assert cache.missing() == [0], (place, bit)
    file.write_bytes(content)
    assert cache.missing() == []


def test_chunk_written_anew_while_we_judged_the_damaged_one(whole, monkeypatch, capsys):
    """A rank that is slow to judge must not delete what another rank has mended by then."""
    file = whole.folder / "logps-00002.safetensors"
    flipped(-7)(file)
    judge = ReferenceCache._damage

    def slow(cache, chunk):
        damage = judge(cache, chunk)
        if damage:
            file.unlink()
            cache.write(chunk, chunk_of(cache, chunk))
        return damage

    monkeypatch.setattr(ReferenceCache, "_damage", slow)
    assert whole.missing() == [] and capsys.readouterr().out == ""
    assert_whole(whole.folder)


def test_refusals(whole):
    pairs = chunk_of(whole, 2)
    first, last = whole.pairs_of(2)[0], whole.pairs_of(2)[-1]
    with pytest.raises(ValueError, match=rf"chunk 2 has {len(pairs)} pairs, not {len(pairs) - 1}"):
        whole.write(2, pairs[:-1])
    with pytest.raises(ValueError, match=rf"pair {last} has {COUNTS[last]} scored tokens, not {COUNTS[last] + 1}"):
        whole.write(2, [*pairs[:-1], np.zeros(COUNTS[last] + 1)])
    with pytest.raises(ValueError, match=r"chunk 2 has \d+ values in one row, not \(3,\)"):
        whole.write(2, np.zeros(3))
    for value in (np.nan, -np.inf):
        wrong = [p.copy() for p in pairs]
        wrong[-1][0] = value
        with pytest.raises(
            UserError,
            match=rf"gives token 1 of the {COUNTS[last]} scored tokens of pair {last} the log-probability {value}; its "
            r"weights are damaged or its arithmetic overflows: check the checkpoint that the stage starts from, or",
        ):
            whole.write(2, wrong)
    with pytest.raises(RuntimeError, match="has not been opened"):
        whole.read(first)
    whole.open()
    for pair in (-1, len(COUNTS)):
        with pytest.raises(IndexError, match=f"pair {pair} of {len(COUNTS)}"):
            whole.read(pair)
    with pytest.raises(ValueError, match="pair 1 has -2 scored tokens, below 0"):
        ReferenceCache(whole.folder, "key", np.array([1, -2]))
    with pytest.raises(ValueError, match=r"counts must be \[P\] integers, not \(2,\) float64"):
        ReferenceCache(whole.folder, "key", np.array([1.0, 2.0]))
    assert_whole(whole.folder)


# ---------------------------------------------------------------- size


def anonymous_memory() -> int:
    """MB that no file backs, so that the kernel cannot take back."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) // 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opens_200k_pairs_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "CHUNK_TOKENS", 2**20)
    counts = np.random.default_rng(0).integers(2, 200, size=200_000)
    cache = ReferenceCache(tmp_path, "key", counts)
    ramp = -np.arange(2**21, dtype=np.float32)
    chunks = [cache.pairs_of(chunk) for chunk in range(cache.num_chunks)]
    for chunk, pairs in enumerate(chunks):
        cache.write(chunk, ramp[: counts[pairs.start : pairs.stop].sum()])
    before = anonymous_memory()
    again = ReferenceCache(tmp_path, "key", counts)
    again.open()
    for pair in np.random.default_rng(1).permutation(200_000)[:20_000]:
        again.read(pair)
    assert counts.sum() * 4 > 75 * 2**20 and anonymous_memory() - before < 24  # MB: the pairs' numbers and one chunk
    last = chunks[-1]
    begin = counts[last.start : last.stop - 1].sum()
    np.testing.assert_array_equal(again.read(last[-1]), ramp[begin : begin + counts[last[-1]]])


# ---------------------------------------------------------------- keys

PARTS = {"rows": "ids and mask", "weights": "sha", "precision": "bf16", "context": "None/None", "version": 1}


def test_key_follows_each_part():
    keys = [reference_key(**PARTS), *(reference_key(**PARTS | {name: "other"}) for name in PARTS)]
    assert len(set(keys)) == 1 + len(PARTS)
    assert all(re.fullmatch("[0-9a-f]{16}", key) for key in keys)
    swapped = PARTS | {"rows": PARTS["weights"], "weights": PARTS["rows"]}
    assert reference_key(**swapped) not in keys
    assert reference_key(**dict(reversed(PARTS.items()))) == keys[0]


def test_key_is_stable():
    """Across processes and releases: a new value here throws away every user's cache."""
    assert reference_key(**PARTS) == "de85da435c036e5a"


@pytest.mark.parametrize("name", ["seed", "beta", "learning_rate", "loss", "ld_alpha"])
def test_key_knows_no_setting_of_the_training(name):
    with pytest.raises(TypeError, match=name):
        reference_key(**PARTS, **{name: 1})


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    for shard in (1, 2):
        weights = {f"layer{shard}": np.full((64, 64), float(shard), dtype=np.float32)}
        (folder / f"model-{shard:05d}-of-00002.safetensors").write_bytes(save(weights))
    (folder / "config.json").write_text('{"rope_theta": 5000000.0}')
    return folder


def test_weights_hash_follows_weights_and_config_alone(tmp_path):
    base = weights_hash(checkpoint(tmp_path / "a"))
    assert base == weights_hash(checkpoint(tmp_path / "b")) and re.fullmatch("[0-9a-f]{64}", base)
    (tmp_path / "b" / "manifest.json").write_text("{}")
    (tmp_path / "b" / "training_args.bin").write_bytes(b"x")
    os.utime(tmp_path / "b" / "config.json", (0, 0))
    assert base == weights_hash(tmp_path / "b")

    def changed(name, edit) -> str:
        folder = checkpoint(tmp_path / name)
        edit(folder)
        return weights_hash(folder)

    shard = "model-00002-of-00002.safetensors"
    assert base != changed("flip", lambda f: flipped(-1)(f / shard))
    assert base != changed("less", lambda f: (f / shard).unlink())
    assert base != changed("name", lambda f: (f / shard).rename(f / "model-00003-of-00003.safetensors"))
    assert base != changed("rope", lambda f: (f / "config.json").write_text('{"rope_theta": 1500000.0}'))


def test_weights_hash_wants_a_checkpoint(tmp_path):
    folder = checkpoint(tmp_path / "a")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"a is not a checkpoint: it has no config.json; save it with save_pretrained"):
        weights_hash(folder)
    with pytest.raises(UserError, match=r"it has no \*.safetensors"):
        weights_hash(tmp_path)
