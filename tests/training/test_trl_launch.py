"""`engine: trl` under the launcher: any backend, cut and continued, with adapters; the same result as our engine."""

import functools
import json

import pytest
import torch

from smolpost.pipeline import manifest
from smolpost.training.checkpoints import WHOLE
from tests.small import PROGRAM, ROOT
from tests.training.test_launch import assert_same

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
TRL = {"sft": ("stages.sft.engine=trl",), "apo": ("stages.apo.engine=trl", "stages.apo.pack_tokens=null")}
ADAPTERS = ("stages.{}.lora.r=2", "stages.{}.lora.alpha=8", "stages.{}.lora.target_modules=[all-linear]")


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


@pytest.mark.parametrize("stage", TRL)
@pytest.mark.parametrize("config", ["ddp", SLOW("zero2"), SLOW("zero3"), SLOW("fsdp2")])
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
    return tuple(word.format(stage) for word in ADAPTERS)


@pytest.mark.parametrize("stage", TRL)
@pytest.mark.parametrize("config", ["single", SLOW("ddp"), SLOW("zero3"), SLOW("fsdp2")])
def test_adapters_are_those_of_our_engine(started, adapted, tmp_path, stage, config):

    small, words = started.copy(tmp_path), (*TRL[stage], *adapters(stage))
    trained(small, stage, config, *words)
    assert_same(small, adapted, stage, *words, words=adapters(stage))


@pytest.mark.parametrize("stage", TRL)
@pytest.mark.parametrize("config", ["single", SLOW("zero3"), SLOW("fsdp2")])
@pytest.mark.parametrize("lora", [False, SLOW(True)], ids=["", "adapters"])
def test_killed_training_goes_on_and_ends_the_same(started, alone, adapted, tmp_path, stage, config, lora):
    cut, words = started.copy(tmp_path), (*TRL[stage], *(adapters(stage) if lora else ()), "stages.apo.save_steps=1")
    step = {"sft": 6, "apo": 2}[stage]
    done = launch(cut, stage, config, *words, program="cut_short.py", CUT_AFTER=str(step))
    folder = cut.folder_of(stage, *words)
    assert done.returncode != 0 and (folder / f"checkpoint-{step}" / WHOLE).exists(), done.stderr[-3000:]
    trained(cut, stage, config, *words)
    assert manifest.read(folder)["report"]["resumed_from"] == f"checkpoint-{step}"
    if lora:
        assert_same(cut, adapted, stage, *words, words=adapters(stage))
        return
    assert_same(cut, alone, stage, *words, words=TRL[stage])
    assert [e["num_tokens"] for e in cut.log(stage, *words)] == [e["num_tokens"] for e in alone.log(stage, *TRL[stage])]
    if config == "single":
        expected = alone.weights(stage, *TRL[stage])
        assert all(torch.equal(tensor, expected[name]) for name, tensor in cut.weights(stage, *words).items())


def test_an_engine_does_not_go_on_from_the_others_checkpoint(started, tmp_path):
    cut = started.copy(tmp_path)
    launch(cut, "sft", "single", program="cut_short.py", CUT_AFTER="4")
    assert (cut.folder_of("sft") / "checkpoint-4" / WHOLE).exists()
    assert cut.folder_of("sft") != cut.folder_of("sft", *TRL["sft"])
    done = trained(cut, "sft", "single", *TRL["sft"])
    assert "resuming" not in done.stdout
    assert manifest.read(cut.folder_of("sft", *TRL["sft"]))["report"]["resumed_from"] is None


def test_trl_leaves_what_our_engine_leaves(alone, single):
    """The same files, tokenizer and configuration; no card of TRL's; the prepared rows as they were."""
    for stage, words in TRL.items():
        ours, trls = single.folder_of(stage), alone.folder_of(stage, *words)
        files = {file.name for file in ours.iterdir()}
        assert {file.name for file in trls.iterdir()} == files and "README.md" not in files
        for name in files & {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}:
            assert json.loads((trls / name).read_text()) == json.loads((ours / name).read_text()), name
