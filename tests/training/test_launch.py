"""The same stage on one process, on two ranks, interrupted, and in other micro-batches: the same result."""

import functools
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolpost.pipeline import manifest
from tests.small import PROGRAM, ROOT, as_written, call, environment

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
WEIGHTS = {"atol": 2e-5, "rtol": 0}  # FACTS section 4: 2 processes against 1


def assert_same(found, expected, stage, *more, words=()):
    """`more` are the found one's further words, `words` the expected one's."""
    logs, reference = found.log(stage, *more), expected.log(stage, *words)
    assert len(logs) == len(reference) > 0
    for entry, wanted in zip(logs, reference, strict=True):
        for key in ("loss", "grad_norm"):
            torch.testing.assert_close(torch.tensor(entry[key]), torch.tensor(wanted[key]), atol=1e-5, rtol=1e-5)
    report = manifest.read(found.folder_of(stage, *more))["report"]
    assert report["written_loss"] == pytest.approx(report["trained_loss"], rel=1e-5)
    weights, wanted = found.weights(stage, *more), expected.weights(stage, *words)
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, **WEIGHTS, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("stage", ["sft", "apo"])
@pytest.mark.parametrize("config", ["ddp", SLOW("zero2"), "zero3"])
def test_two_ranks_match_one_process(started, single, tmp_path, stage, config):
    two = started.copy(tmp_path)
    done = two.launch(stage, config, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert manifest.read(two.folder_of(stage))["report"]["num_processes"] == 2
    assert_same(two, single, stage)


@pytest.mark.parametrize("stage", ["sft", SLOW("apo")])
def test_fsdp2_matches_one_process(started, single, tmp_path, stage):
    two = started.copy(tmp_path)
    shim = (str(ROOT / "tests" / "training" / "fsdp_on_cpu.py"),)
    done = two.launch(stage, "fsdp2", 2, program=shim, ACCELERATE_TORCH_DEVICE="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(two, single, stage)


@pytest.mark.parametrize("policy", ["selective", SLOW("full")])
@pytest.mark.parametrize("config", ["ddp", SLOW("zero3"), SLOW("fsdp2")])
@pytest.mark.parametrize("words", [(), SLOW(("stages.sft.lora.r=2",))], ids=["all weights", "adapters"])
def test_recomputing_on_two_ranks_changes_nothing(started, single, tmp_path, config, policy, words):
    two, policy = started.copy(tmp_path), f"stages.sft.activation_checkpointing={policy}"
    shim = {"program": (str(ROOT / "tests/training/fsdp_on_cpu.py"),), "ACCELERATE_TORCH_DEVICE": "cpu"}
    expected = single
    if words:
        expected = started.copy(tmp_path / "single")
        assert expected.launch("sft", "single", 1, *words).returncode == 0
    done = two.launch("sft", config, 2, policy, *words, **shim if config == "fsdp2" else {})
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(two, expected, "sft", *words, words=words)


@pytest.mark.parametrize(
    "config, words",
    [
        ("single", ()), SLOW("single", ("stages.sft.lora.r=2",)),
        SLOW("ddp", ()), SLOW("zero2", ()), SLOW("zero3", ()), SLOW("fsdp2", ()),
    ],
)  # fmt: skip
def test_a_log_file_holds_our_lines_and_no_library_warns(started, tmp_path, config, words):
    """stderr is what `smolpost run > log 2>&1` would add to the log: no bar's control characters, no warning."""
    small = started.copy(tmp_path)
    shim = (str(ROOT / "tests" / "training" / "fsdp_on_cpu.py"),) if config == "fsdp2" else PROGRAM
    ranks = 1 if config == "single" else 2
    command = small.launch_command("sft", config, ranks, "stages.sft.max_steps=4", *words, program=shim)
    command[2] = "smolpost.launch"  # accelerate, as `run` starts it
    done = call(command, env=environment() | ({"ACCELERATE_TORCH_DEVICE": "cpu"} if config == "fsdp2" else {}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [re.sub(r"\d+ s$", "", line) for line in done.stderr.split("\n")] == [
        "tokenize sft: 120 rows in ", f"train on {ranks} x cpu: 4 steps in ", ""
    ]  # fmt: skip
    folder = small.folder_of("sft", "stages.sft.max_steps=4", *words)
    said = done.stdout.partition("shows its rows\n")[2].splitlines()  # after the table of the prepared rows
    # DeepSpeed prints it on a CPU, once for each rank.
    said = [line for line in said if not re.fullmatch(r"DeepSpeed \S+ built successfully", line)]
    assert said[-1] == str(folder) and [line.split()[0] for line in said[:-1]] == [
        "learning", "step", "1/4", "2/4", "3/4", "4/4"
    ]  # fmt: skip
    assert "WARN" not in done.stdout.upper() and "\r" not in done.stdout and "\x1b" not in done.stdout
    kept = (folder.parent / "logs" / f"{folder.name}.log").read_text().splitlines()
    assert kept[0].startswith("--- 20") and kept[-1].endswith("ends with exit code 0")
    own = [line for line in kept[1:-1] if not line.startswith("[rank 1] ")]
    assert sorted(own) == sorted(done.stdout.splitlines() + done.stderr.splitlines())


def test_forks_of_a_run_give_the_bytes_of_the_pasted_commands(started, single, tmp_path):
    forked = started.copy(tmp_path)
    done = forked.smolpost("run", "stage=sft")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [entry["loss"] for entry in forked.log("sft")] == [entry["loss"] for entry in single.log("sft")]
    found, expected = forked.weights("sft"), single.weights("sft")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_training_moves_the_weights(started, single):
    """The comparisons above would hold for a trainer that does nothing."""
    start, trained = started.weights("init"), single.weights("sft")
    moved = max((trained[name] - tensor).abs().max().item() for name, tensor in start.items())
    assert moved > 1e-3
    losses = [entry["loss"] for entry in single.log("sft")]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    "words", [("sft", "stages.sft.micro_batch_size=4"), ("apo", "stages.apo.pack_tokens=9999")], ids=lambda w: w[1]
)
def test_forward_passes_do_not_matter(started, single, tmp_path, words):
    other = started.copy(tmp_path)
    done = other.launch(words[0], "single", 1, words[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(other, single, *words)


@pytest.mark.parametrize("config, processes", [SLOW("single", 1), SLOW("zero3", 2)])
def test_snapshots_are_the_weights_of_their_step(started, tmp_path, config, processes):
    """At a constant learning rate, the weights of step 3 of six are those of a run of three."""
    constant = ["stages.sft.lr_scheduler=constant", "stages.sft.warmup_ratio=0"]
    long = [*constant, "stages.sft.max_steps=6", "stages.sft.snapshot_steps=3"]
    short = [*constant, "stages.sft.max_steps=3"]
    small = started.copy(tmp_path)
    for words in (long, short):
        done = small.launch("sft", config, processes, *words)
        assert done.returncode == 0, done.stderr[-3000:]
    folder = small.folder_of("sft", *long)
    assert [f.name for f in (folder / "snapshots").iterdir()] == ["step-3"]
    kept, expected = load_file(folder / "snapshots/step-3/model.safetensors"), small.weights("sft", *short)
    final = small.weights("sft", *long)
    assert kept.keys() == expected.keys() == final.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(kept[name], tensor, **WEIGHTS)
    assert max((final[name] - tensor).abs().max().item() for name, tensor in kept.items()) > 1e-4
    stored = [json.loads((place / "config.json").read_text()) for place in (folder, folder / "snapshots/step-3")]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("stage", [SLOW("sft"), "apo"])
def test_a_batch_that_does_not_divide_over_the_ranks(started, tmp_path, stage):
    """Five rows on two ranks are the five rows of one process, and the empty forward pass is no secret."""
    words = [f"stages.{stage}.global_batch_size=5", f"stages.{stage}.max_steps=3"]
    words += ["stages.apo.pack_tokens=2"]  # a pass for every pair
    one, two = started.copy(tmp_path / "one"), started.copy(tmp_path / "two")
    for small, config, processes in ((one, "single", 1), (two, "ddp", 2)):
        done = small.launch(stage, config, processes, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        told = f"stages.{stage}.global_batch_size=5 does not divide over 2 ranks: 17% of the forward passes are empty"
        assert (told in done.stdout) == (processes == 2)
    assert_same(two, one, stage, *words, words=words)


def test_the_reference_is_worked_out_once_for_all_seeds_and_losses(started, tmp_path):
    """Another seed, beta and loss find the cache; another reference, or a damaged chunk, does not."""
    small = started.copy(tmp_path)

    def scored(*words):
        done = small.launch("apo", "single", 1, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        report = manifest.read(small.folder_of("apo", *words))["report"]
        return report["reference_pairs_scored"], report["reference_cache"], done.stdout

    pairs, cache, _ = scored()
    assert pairs == 120
    changed = ["stages.apo.seeds=[2]", "stages.apo.beta=0.3", "stages.apo.loss=sigmoid", "stages.apo.ld_alpha=0.5"]
    assert scored(*changed)[:2] == (0, cache)
    chunk = next(Path(cache).glob("logps-*.safetensors"))
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    again, where, printed = scored("stages.apo.seeds=[3]")
    assert (again, where) == (120, cache) and "logps-00000" in printed
    done = small.launch("sft", "single", 1, "stages.sft.max_steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    other, elsewhere, _ = scored("stages.apo.init_from=sft", "stages.sft.max_steps=3")
    assert other == 120 and elsewhere != cache


@pytest.mark.parametrize("config", ["single", SLOW("ddp"), SLOW("zero3"), SLOW("fsdp2")])
def test_adapters_train_alone_and_are_merged(started, tmp_path, config):
    """The result is an ordinary checkpoint whose linear layers moved by a matrix of the adapters' rank."""
    small = started.copy(tmp_path)
    words = ["stages.apo.lora.r=2", "stages.apo.lora.alpha=8", "stages.apo.lora.target_modules=[all-linear]"]
    shim = {"program": (str(ROOT / "tests/training/fsdp_on_cpu.py"),), "ACCELERATE_TORCH_DEVICE": "cpu"}
    done = small.launch("apo", config, 1 if config == "single" else 2, *words, **shim if config == "fsdp2" else {})
    assert done.returncode == 0, done.stderr[-3000:]
    assert small.log("apo", *words)[0]["loss"] == pytest.approx(1, abs=1e-5)
    start, trained = started.weights("init"), small.weights("apo", *words)
    assert trained.keys() == start.keys()
    for name, tensor in trained.items():
        moved = tensor - start[name]
        if "_proj" in name:
            values = torch.linalg.svdvals(moved)
            assert values[1] > 1e-5 and values[2] < 1e-6
        else:
            assert not moved.any()


@pytest.mark.parametrize(("config", "processes"), [("single", 1), SLOW("ddp", 2), SLOW("zero3", 2)])
def test_a_stage_whose_written_model_is_another_is_not_finished(started, tmp_path, config, processes):
    small = started.copy(tmp_path)
    wrong = (str(ROOT / "tests/training/wrong_writer.py"),)
    done = small.launch("sft", config, processes, "stages.sft.max_steps=3", program=wrong)
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("smolpost:")]
    folder = small.folder_of("sft", "stages.sft.max_steps=3")
    assert line.startswith(f"smolpost: stages.sft: the model written to {folder} has a loss of ")
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize("verb", ["run", "doctor"])
def test_targets_of_adapters_are_refused_before_preparation(started, tmp_path, verb):
    small = started.copy(tmp_path)
    words = ["stage=sft", "stages.sft.lora.r=2", "stages.sft.lora.target_modules=[q_proj,lm_head]"]
    done = small.smolpost(verb, *words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "smolpost: stages.sft.lora.target_modules names lm_head, the head of"
    )
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs/gsm8k").glob("prepared/*/manifest.json"))


def test_a_start_that_would_not_load_whole_is_refused_before_preparation(started, tmp_path):
    small = started.copy(tmp_path)
    file = small.folder_of("init") / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp" not in name}
    save_file(tensors, file, {"format": "pt"})
    done = small.smolpost("run", "stage=sft")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"smolpost: {file} is not the file that was written: ")
    as_written(file.parent)
    for verb in ("run", "doctor"):
        done = small.smolpost(verb, "stage=sft")
        assert done.returncode == 2
        assert "smolpost: stages.sft.init_from=init would not load whole: " in done.stderr.splitlines()[-1]
        assert "lacks tensor model.layers.1.mlp.down_proj.weight (3 such); save it" in done.stderr.splitlines()[-1]


def test_killed_training_goes_on_and_ends_the_same(started, single, tmp_path):
    """kill -9 of the whole process group once a checkpoint is whole; the same command continues from it."""
    cut = started.copy(tmp_path)
    process = subprocess.Popen(
        cut.launch_command("sft", "single", 1),
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    folder = cut.folder_of("sft")
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-2" / "whole").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "manifest.json").exists()
    # A checkpoint that was cut short while saving is no checkpoint.
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "trainer_state.json").write_text("{}")
    done = cut.launch("sft", "single", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-5 was cut short while saving; removed" in done.stdout
    assert "resuming from" in done.stdout
    assert manifest.read(folder)["report"]["resumed_from"] in {f"checkpoint-{step}" for step in range(2, 12, 2)}
    assert_same(cut, single, "sft")
    assert not list(folder.glob("checkpoint-*"))


def test_finished_stage_is_not_trained_again(single):
    before = manifest.read(single.folder_of("sft"))["finished"]
    done = single.launch("sft", "single", 1)
    assert done.returncode == 0 and "is finished" in done.stdout
    assert manifest.read(single.folder_of("sft"))["finished"] == before


def test_launch_refuses_in_one_line(started, tmp_path):
    other = started.copy(tmp_path)
    done = other.launch("sft", "ddp", 2, "stages.sft.global_batch_size=1")
    lines = [line for line in done.stderr.splitlines() if line.startswith("smolpost:")]
    assert lines == [
        "smolpost: stages.sft.global_batch_size=1 is below num_processes=2, and a rank without a row has nothing to "
        "do; raise it, or launch fewer processes"
    ]
    assert done.returncode != 0
    assert not (other.folder_of("sft", "stages.sft.global_batch_size=1") / "manifest.json").exists()
