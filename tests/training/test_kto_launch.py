"""A kto stage under the launcher: added to a pipeline, cut and continued, with adapters, on two ranks."""

import pytest
import torch

from smolpost.pipeline import manifest
from smolpost.training.checkpoints import WHOLE
from tests.small import PROGRAM, ROOT
from tests.training.test_launch import assert_same

WORDS = (
    "+stage@stages.kto=kto", "stages.kto.init_from=init", "stages.kto.max_seq_len=512", "stages.kto.max_steps=4",
    "stages.kto.global_batch_size=4", "stages.kto.micro_batch_size=2", "stages.kto.learning_rate=1e-3",
    "stages.kto.max_grad_norm=1.0", "stages.kto.logging_steps=1", "stages.kto.save_steps=2",
)  # fmt: skip
METRICS = ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "num_tokens")
ADAPTERS = ("stages.kto.lora.r=2", "stages.kto.lora.alpha=8")


def trained(small, config, *words, processes=1, program=PROGRAM, **variables):
    return small.launch("kto", config, processes, *WORDS, *words, program=program, **variables)


def program(name):
    return (str(ROOT / "tests/training" / name),)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ADAPTERS], ids=["", "adapters"])
def test_killed_training_goes_on_and_ends_the_same(started, tmp_path_factory, words):
    whole, cut = (started.copy(tmp_path_factory.mktemp(name)) for name in ("whole", "cut"))
    done = trained(whole, "single", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weigh" not in done.stdout  # 120 pairs: as many desired completions as undesired ones
    report = manifest.read(whole.folder_of("kto", *WORDS, *words))["report"]
    assert report["written_loss"] == pytest.approx(report["trained_loss"], rel=1e-5)
    assert report["loss_first"] == pytest.approx(0.5, abs=1e-6)  # the reference is the start
    done = trained(cut, "single", *words, program=program("cut_short.py"), CUT_AFTER="2")
    folder = cut.folder_of("kto", *WORDS, *words)
    assert done.returncode != 0 and (folder / "checkpoint-2" / WHOLE).exists(), done.stderr[-3000:]
    done = trained(cut, "single", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert manifest.read(folder)["report"]["resumed_from"] == "checkpoint-2"
    logs = [small.log("kto", *WORDS, *words) for small in (cut, whole)]
    assert [[entry.get(key) for key in METRICS] for entry in logs[0]] == [
        [entry.get(key) for key in METRICS] for entry in logs[1]
    ]
    expected = whole.weights("kto", *WORDS, *words)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in cut.weights("kto", *WORDS, *words).items())


@pytest.mark.slow
def test_two_ranks_share_one_estimate_of_the_divergence(started, tmp_path_factory):
    """As one process whose pass has the rows of both ranks, and pairs completions within each rank's half."""
    two, one = (started.copy(tmp_path_factory.mktemp(name)) for name in ("two", "one"))
    done = trained(two, "ddp", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert manifest.read(two.folder_of("kto", *WORDS))["report"]["num_processes"] == 2
    words = ("stages.kto.micro_batch_size=4",)
    done = trained(one, "single", *words, program=program("kto_in_halves.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(two, one, "kto", *WORDS, words=(*WORDS, *words))
    for found, expected in zip(two.log("kto", *WORDS), one.log("kto", *WORDS, *words), strict=True):
        assert found.keys() == expected.keys()  # a step without one of the labels has no reward of it
        for key in expected.keys() & {"kl", "rewards/chosen", "rewards/rejected"}:
            assert found[key] == pytest.approx(expected[key], abs=1e-4), key
    assert any(entry["kl"] > 0 for entry in two.log("kto", *WORDS))
