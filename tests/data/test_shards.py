"""Tokenization in processes: the same bytes whatever the workers, and nothing lost to a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from smolpost.data import shards
from smolpost.data.prepare import prepare
from smolpost.data.source_slice import SourceSlice, joined
from smolpost.errors import UserError
from smolpost.schema import Mixture, Source
from smolpost.stages.sft import SFTStage

STAGE = {"init_from": "x", "data": "y", "max_seq_len": 64, "learning_rate": 1e-3, "global_batch_size": 1}


def write_texts(file: Path, number: int) -> str:
    file.write_text("".join(json.dumps({"text": f"row {i} " + "x" * (i % 7)}) + "\n" for i in range(number)))
    return str(file)


def made(folder: Path) -> dict[str, bytes]:
    """Files of a prepared folder, with the tokenized ones beside it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def run(mixture, tokenizer, folder: Path, **settings):
    (out := folder / "rows").mkdir(parents=True)
    return prepare(SFTStage(**STAGE | settings), mixture, tokenizer, lambda name: folder / "tokenized" / name, out)


@pytest.fixture
def many_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)


def test_the_number_of_workers_changes_no_byte(tokenizer, tmp_path, many_shards):
    sources = {
        "a": Source(path=write_texts(tmp_path / "a.jsonl", 30), weight=0.7),
        "b": Source(path=write_texts(tmp_path / "b.jsonl", 9), weight=2.5),
    }
    for workers in (1, 2, 3):
        run(Mixture(sources=sources, seed=3), tokenizer, tmp_path / str(workers), num_workers=workers)
    files = [made(tmp_path / str(workers)) for workers in (1, 2, 3)]
    assert files[0] == files[1] == files[2]
    assert sum(name.startswith("tokenized") for name in files[0]) == 8 + 3  # ceil(30 / 4) and ceil(9 / 4)


def test_many_rows_make_few_shards_and_the_same_prepared_rows(tokenizer, tmp_path, many_shards, monkeypatch):
    mixture = Mixture(sources={"a": Source(path=write_texts(tmp_path / "a.jsonl", 100), weight=0.5)})
    found = {}
    for most in (512, 5):
        monkeypatch.setattr(shards, "MAX_SHARDS", most)
        run(mixture, tokenizer, tmp_path / str(most), num_workers=2)
        found[most] = made(tmp_path / str(most) / "rows")
        assert len(list((tmp_path / str(most) / "tokenized" / "a").iterdir())) == min(most, 25)
    assert found[512] == found[5]


def test_slices_are_joined_within_a_path():
    parts = [SourceSlice(path, "arrow", i, i + 4, i + 1, i, 4) for path in "ab" for i in range(0, 12, 4)]
    found = joined(parts, 9)
    assert [(s.path, s.begin, s.end, s.line, s.first, s.num_rows) for s in found] == [
        ("a", 0, 8, 1, 0, 8),
        ("a", 8, 12, 9, 8, 4),
        ("b", 0, 8, 1, 0, 8),
        ("b", 8, 12, 9, 8, 4),
    ]
    assert joined(parts, 3) == parts


def test_the_first_bad_row_is_named_whichever_worker_finds_one(tokenizer, tmp_path, many_shards):
    lines = [json.dumps({"text": "fine"})] * 40
    lines[13], lines[30] = '{"text": 1}', '{"text": 2}'
    (file := tmp_path / "a.jsonl").write_text("\n".join(lines))
    for workers in (1, 3):
        with pytest.raises(UserError, match=r"a.jsonl:14: text is a"):
            run(
                Mixture(sources={"a": Source(path=str(file))}),
                tokenizer,
                tmp_path / str(workers),
                num_workers=workers,
                max_dropped=0.04,
            )


def test_a_first_shard_of_refused_rows_ends_the_run(tokenizer, tmp_path, many_shards):
    lines = ['{"words": "x"}'] * 4 + [json.dumps({"text": "fine"})] * 40
    (file := tmp_path / "a.jsonl").write_text("\n".join(lines))
    mixture = Mixture(sources={"a": Source(path=str(file))})
    with pytest.raises(UserError, match=r"a.jsonl:1: has the columns words; .* \(so are all of the first 4 rows\)$"):
        run(mixture, tokenizer, tmp_path / "out", num_workers=1)
    file.write_text("\n".join(reversed(lines)))
    assert run(mixture, tokenizer, tmp_path / "late", num_workers=1)["totals"]["dropped"] == {"refused": 4}


def test_only_taken_rows_are_tokenized_and_only_once(tokenizer, tmp_path, many_shards, monkeypatch):
    counted = []
    inner = shards.token_batches
    monkeypatch.setattr(
        shards, "token_batches", lambda stage, rows, *rest: inner(stage, (counted.append(r) or r for r in rows), *rest)
    )
    path = write_texts(tmp_path / "a.jsonl", 40)
    few = Mixture(sources={"a": Source(path=path, weight=0.25)})
    report = run(few, tokenizer, tmp_path / "one", num_workers=1)
    assert len(counted) == report["totals"]["rows_read"] == 10
    assert report["totals"]["rows_available"] == 40
    (tmp_path / "one" / "rows").rename(tmp_path / "first")
    again = run(few, tokenizer, tmp_path / "one", num_workers=1, packing="none")  # other packing, same tokens
    assert len(counted) == 10 and again["totals"]["packs"] == 10
    thrice = run(Mixture(sources={"a": Source(path=path, weight=3)}), tokenizer, tmp_path / "two", num_workers=1)
    assert len(counted) == 50
    assert (thrice["totals"]["rows_read"], thrice["totals"]["rows_repeated"]) == (120, 80)


def test_a_half_written_shard_is_made_again(tokenizer, tmp_path, many_shards, capsys):
    mixture = Mixture(sources={"a": Source(path=write_texts(tmp_path / "a.jsonl", 20))})
    run(mixture, tokenizer, tmp_path / "one", num_workers=1)
    whole = made(tmp_path / "one")
    broken = sorted((tmp_path / "one" / "tokenized" / "a").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:-50])
    (tmp_path / "one" / "tokenized" / "a" / ".0000000000-4-0.arrow.part-abc").write_bytes(b"of a killed process")
    (tmp_path / "one" / "rows").rename(tmp_path / "aside")
    run(mixture, tokenizer, tmp_path / "one", num_workers=1)
    assert made(tmp_path / "one") == whole
    said = re.sub(r"\d+ s", "0 s", capsys.readouterr().err)
    assert said == "tokenize y: 20 rows in 0 s\ntokenize y: 20 rows in 0 s (16 were there)\n"


SCRIPT = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from smolpost.data import prepare as p, shards
from smolpost.schema import Mixture, Source
from smolpost.stages.sft import SFTStage
shards.SHARD_ROWS = 4
if sys.argv[2] == "slow":
    inner = shards.token_batches
    def slow(*args):
        time.sleep(0.2)
        return inner(*args)
    shards.token_batches = slow
folder = Path(sys.argv[1])
(folder / "rows").mkdir(exist_ok=True)
stage = SFTStage(
    init_from="x", data="y", max_seq_len=64, learning_rate=1e-3, global_batch_size=1, num_workers=int(sys.argv[3])
)
mixture = Mixture(sources={"a": Source(path=str(folder / "a.jsonl"))})
tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
p.prepare(stage, mixture, tokenizer, lambda name: folder / "tokenized" / name, folder / "rows")
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1)])
def test_workers_end_with_their_parent(tokenizer, tmp_path, end, code):
    write_texts(tmp_path / "a.jsonl", 200)
    tokenizer.save_pretrained(tmp_path / "tok")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "slow", "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while len(workers := psutil.Process(process.pid).children()) < 2:
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(0.3)
    # ctrl-C goes to the whole group, a kill to one process.
    os.kill(process.pid, end) if end == signal.SIGKILL else os.killpg(process.pid, end)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    errors = process.communicate(timeout=20)[1]
    assert process.returncode in (code, -end)
    assert errors.count("Traceback") == (end == signal.SIGINT)  # the parent's own


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_and_started_again_it_goes_on_and_ends_with_the_same_bytes(tokenizer, tmp_path, workers):
    found = {}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        write_texts(tmp_path / name / "a.jsonl", 60)
        tokenizer.save_pretrained(tmp_path / name / "tok")
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "whole"), "fast", workers], check=True)
    cut, tokenized = tmp_path / "cut", tmp_path / "cut" / "tokenized" / "a"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(cut), "slow", workers], start_new_session=True)
    while len(list(tokenized.glob("0*.arrow"))) < 4:
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in tokenized.glob("0*.arrow")}
    assert 4 <= len(kept) < 15
    subprocess.run([sys.executable, "-c", SCRIPT, str(cut), "fast", workers], check=True)
    assert all(file.stat().st_mtime_ns == made_at for file, made_at in kept.items())
    for name in ("whole", "cut"):
        folder = tmp_path / name
        found[name] = made(folder / "tokenized") | made(folder / "rows")
        for key, content in found[name].items():  # each run names its own file
            found[name][key] = content.replace(str(folder).encode(), b"") if key.endswith("l") else content
    assert {k: v for k, v in found["whole"].items() if not k.endswith((".arrow", ".parquet"))} == {
        k: v for k, v in found["cut"].items() if not k.endswith((".arrow", ".parquet"))
    }
    packs = "data-00000-of-00001.arrow"
    assert found["whole"][packs] == found["cut"][packs]
