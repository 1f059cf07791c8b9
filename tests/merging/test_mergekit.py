"""mergekit's linear method through our checks: the golden reference of our engine."""

import logging
import subprocess
import sys

import pytest
import torch

from smolpost.files import sha256
from smolpost.merging.linear import merge
from tests.merging.checkpoints import mean, save_checkpoint, weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three checkpoints of each dtype, by dtype and name."""
    root = tmp_path_factory.mktemp("trained")
    return {
        dtype: {n: save_checkpoint(root / dtype / n, i, dtype=getattr(torch, dtype)) for i, n in enumerate("abc")}
        for dtype in ("float32", "bfloat16", "float16")
    }


def ordered(values):
    """Floats as integers in their order, neighbours one apart."""
    bits = values.view({4: torch.int32, 2: torch.int16}[values.dtype.itemsize])
    return torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits.long(), bits.long())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_our_engine_is_within_one_ulp_of_mergekit(stored, dtype, trained, tmp_path):
    inputs = [(name, trained[stored][name], weight) for name, weight in zip("abc", (0.45, 0.45, 0.1), strict=True)]
    reports = {
        engine: merge(inputs, "a", tmp_path / engine, dtype, engine=engine, verification="full")
        for engine in ("ours", "mergekit")
    }
    ours, theirs = (weights(tmp_path / engine) for engine in ("ours", "mergekit"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype == getattr(torch, dtype)
        assert (ordered(ours[name]) - ordered(theirs[name])).abs().max() <= 1, name
    # The same operations in the same order and one layout, so in fact the same bytes.
    assert len({sha256(tmp_path / engine / "model.safetensors") for engine in ("ours", "mergekit")}) == 1
    same = {key: value for key, value in reports["ours"].items() if key not in ("engine", "seconds")}
    assert same == {key: reports["mergekit"][key] for key in same}


def test_one_folder_under_two_names_keeps_both_weights(trained, tmp_path):
    a, b = trained["float32"]["a"], trained["float32"]["b"]
    inputs = [("x", a, 0.25), ("y", a, 0.125), ("z", b, 0.625)]
    merge(inputs, "y", tmp_path / "out", "float32", engine="mergekit")
    exact = mean([(a, 0.375), (b, 0.625)])
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=0, atol=2.4e-7)


def test_every_tensor_of_sharded_untied_models_is_merged(tmp_path):
    # A folder name with + and @, which mergekit would read as an adapter and a revision.
    a = save_checkpoint(tmp_path / "a+x@y z", 0, tie_word_embeddings=False, shard="3KB")
    b = save_checkpoint(tmp_path / "b", 1, tie_word_embeddings=False)
    merge([("a", a, 0.5), ("b", b, 0.5)], "b", tmp_path / "out", "float32", engine="mergekit")
    exact = {n: t.float() for n, t in mean([(a, 0.5), (b, 0.5)]).items()}
    torch.testing.assert_close(weights(tmp_path / "out"), exact, rtol=0, atol=0)


def test_second_merge_reads_what_the_folder_holds_now_and_logging_is_restored(trained, tmp_path):
    a, b = trained["float32"]["a"], save_checkpoint(tmp_path / "b", 1)
    before = logging.getLogger().handlers[:], logging.root.manager.disable
    merge([("a", a, 0.5), ("b", b, 0.5)], "a", tmp_path / "one", "float32", engine="mergekit")
    for file in b.iterdir():
        file.unlink()
    save_checkpoint(b, 7, shard="3KB")
    merge([("a", a, 0.5), ("b", b, 0.5)], "a", tmp_path / "two", "float32", engine="mergekit")
    exact = {n: t.float() for n, t in mean([(a, 0.5), (b, 0.5)]).items()}
    torch.testing.assert_close(weights(tmp_path / "two"), exact, rtol=0, atol=0)
    assert (logging.getLogger().handlers, logging.root.manager.disable) == before


MERGE = """
import sys
from pathlib import Path
from smolpost.merging.linear import merge
a, b, out = map(Path, sys.argv[1:])
merge([("a", a, 0.5), ("b", b, 0.5)], "a", out, "float32", engine="mergekit")
"""


def test_its_warnings_are_kept_from_the_user_and_its_files_from_the_result(trained, tmp_path):
    # In a fresh process, so mergekit's logging and its progress bar are as a user sees them.
    folders = [str(trained["float32"][name]) for name in "ab"]
    command = [sys.executable, "-c", MERGE, *folders, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Executing graph" in done.stderr
    assert "No JSON architecture" not in done.stderr
    assert "Inferred" not in done.stderr
    assert not (tmp_path / "out" / "mergekit_config.yml").exists()
    assert "mergekit" not in (tmp_path / "out" / "README.md").read_text()
