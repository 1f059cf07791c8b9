"""`engine: trl` under the launcher: any backend, cut and continued, with adapters; the same result as our engine."""

import functools
import json
import re

import pytest
import torch

from smolpost import recipe
from smolpost.pipeline import manifest
from smolpost.pipeline.lineage import Lineage
from smolpost.training.checkpoints import WHOLE
from tests.small import PROGRAM, ROOT
from tests.training.test_launch import assert_same

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
TRL = {"sft": ("stages.sft.engine=trl",), "apo": ("stages.apo.engine=trl", "stages.apo.pack_tokens=null")}
SHARDED = ("zero2", "zero3", "fsdp2")


def launch(small, stage, config, *words, program=None, **variables):
    """On two ranks but for `single`."""
    if config == "fsdp2":
        program = program or "fsdp_on_cpu.py"
        variables |= {"ACCELERATE_TORCH_DEVICE": "cpu"}
    program = (str(ROOT / "tests/training" / program),) if program else PROGRAM
    return small.launch(stage, config, 1 if config == "single" else 2, *words, program=program, **variables)


def trained(small, stage, config, *words):
    done = launch(small, stage, config, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def alone(started, tmp_path_factory):
    """Both stages by TRL on one process."""
    small = started.copy(tmp_path_factory.mktemp("alone"))
    for stage, words in TRL.items():
        trained(small, stage, "single", *words)
    return small


@pytest.mark.parametrize("stage", TRL)
def test_one_process_is_one_of_our_engine(alone, single, stage):
    assert_same(alone, single, stage, *TRL[stage])
    ours, trls = (manifest.read(small.folder_of(stage, *words)) for small, words in ((single, ()), (alone, TRL[stage])))
    assert trls["files"].keys() == ours["files"].keys()


@pytest.mark.parametrize(
    ("stage", "config"),
    [("sft", "ddp"), SLOW("apo", "ddp"), *(SLOW(stage, config) for stage in TRL for config in SHARDED)],
)
def test_two_ranks_are_one_process_of_our_engine(started, single, tmp_path, stage, config):
    """Forward passes of one row, so each rank accumulates two of them for a step."""
    two = started.copy(tmp_path)
    trained(two, stage, config, *TRL[stage])
    assert manifest.read(two.folder_of(stage, *TRL[stage]))["report"]["num_processes"] == 2
    assert_same(two, single, stage, *TRL[stage])


@pytest.fixture(scope="module")
def adapted(started, tmp_path_factory):
    """Both stages by our engine with adapters."""
    small = started.copy(tmp_path_factory.mktemp("adapted"))
    for stage in TRL:
        trained(small, stage, "single", *adapters(stage))
    return small


def adapters(stage):
    return tuple(f"stages.{stage}.lora.{word}" for word in ("r=2", "alpha=8", "target_modules=[all-linear]"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRL)
@pytest.mark.parametrize("config", ["single", "ddp", "zero3", "fsdp2"])
def test_adapters_are_those_of_our_engine(started, adapted, tmp_path, stage, config):
    small, words = started.copy(tmp_path), (*TRL[stage], *adapters(stage))
    trained(small, stage, config, *words)
    assert_same(small, adapted, stage, *words, words=adapters(stage))


@pytest.mark.parametrize(
    ("stage", "config"),
    [("sft", "single"), SLOW("apo", "single"), *(SLOW(stage, config) for stage in TRL for config in SHARDED)],
)
def test_killed_training_goes_on_and_ends_the_same(started, alone, tmp_path, stage, config):
    cut = started.copy(tmp_path)
    assert_goes_on(cut, alone, stage, config, TRL[stage], TRL[stage])
    found, expected = (small.log(stage, *TRL[stage]) for small in (cut, alone))
    assert [entry["num_tokens"] for entry in found] == [entry["num_tokens"] for entry in expected]
    if config == "single":
        weights = alone.weights(stage, *TRL[stage])
        assert all(torch.equal(tensor, weights[name]) for name, tensor in cut.weights(stage, *TRL[stage]).items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRL)
@pytest.mark.parametrize("config", ["single", "zero3"])
def test_killed_training_of_adapters_goes_on(started, adapted, tmp_path, stage, config):
    words = (*TRL[stage], *adapters(stage))
    assert_goes_on(started.copy(tmp_path), adapted, stage, config, words, adapters(stage))


def assert_goes_on(cut, whole, stage, config, words, of_whole):
    """Killed once the checkpoint of a step is whole, and continued, it is the stage that was never cut."""
    step, saving = {"sft": 6, "apo": 2}[stage], f"stages.{stage}.save_steps=1"
    done = launch(cut, stage, config, *words, saving, program="cut_short.py", CUT_AFTER=str(step))
    folder = cut.folder_of(stage, *words)
    assert done.returncode != 0 and (folder / f"checkpoint-{step}" / WHOLE).exists(), done.stderr[-3000:]
    trained(cut, stage, config, *words, saving)
    assert manifest.read(folder)["report"]["resumed_from"] == f"checkpoint-{step}"
    assert_same(cut, whole, stage, *words, words=of_whole)


@pytest.mark.parametrize("stage", TRL)
def test_the_engines_have_folders_of_their_own(started, stage):
    """So neither goes on from the other's checkpoint. Rows are prepared once for both."""
    ours, trls = (planned(started, stage, *words) for words in ((), TRL[stage]))
    assert ours.folder != trls.folder and ours.prepared == trls.prepared


@pytest.mark.parametrize(
    ("stage", "word", "is_kept"),
    [
        ("sft", "stages.sft.trl.loss_type=dft", False), ("apo", "stages.apo.trl.micro_batch_size=2", False),
        ("apo", "stages.apo.trl.loss_type=[hinge]", False), ("sft", "stages.sft.micro_batch_size=2", True),
        ("apo", "stages.apo.trl.precompute_ref_log_probs=true", True),
    ],
)  # fmt: skip
def test_trls_settings_remake_a_stage_unless_they_only_tune(started, stage, word, is_kept):
    before, after = (planned(started, stage, *words) for words in (TRL[stage], (*TRL[stage], word)))
    assert (before.folder == after.folder) == is_kept


def planned(small, stage, *words):
    return Lineage(recipe.load([*small.words, *words])).stages[stage]


def test_trl_leaves_what_our_engine_leaves(alone, single):
    """The same files, tokenizer and configuration; no card of TRL's."""
    for stage, words in TRL.items():
        ours, trls = single.folder_of(stage), alone.folder_of(stage, *words)
        files = {file.name for file in ours.iterdir()}
        assert {file.name for file in trls.iterdir()} == files and "README.md" not in files
        for name in files & {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}:
            assert json.loads((trls / name).read_text()) == json.loads((ours / name).read_text()), name


def test_a_log_file_holds_our_lines_and_no_library_warns(alone):
    done = alone.smolpost("run", "stage=sft", *TRL["sft"], "stages.sft.max_steps=2")
    assert done.returncode == 0, done.stderr
    lines = [re.sub(r"\d+ s$", "", line) for line in done.stderr.splitlines()]
    assert [line for line in lines if not line.startswith("tokenize")] == ["train on 1 x cpu: 2 steps in "]
    steps = [line for line in done.stdout.splitlines() if re.match(r" *\d/2 +[\d.]+ ", line)]
    assert len(steps) == 2 and all(len(line) <= 80 for line in steps)
