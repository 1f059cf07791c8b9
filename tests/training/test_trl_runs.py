"""A stage by TRL from its first step to its last: cut and continued, its reference worked out before, with adapters."""

import copy
import dataclasses
import os
import signal

import pytest
import torch
import trl.trainer.base_trainer
from datasets import load_from_disk

from smolpost import signals
from smolpost.files import hashes
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from smolpost.training.adapters import add_adapters
from smolpost.training.settings import LoRA, TRLPreference
from smolpost.training.with_trl import preference
from tests.training.tiny_trainers import (
    CPU,
    assert_logs_equal,
    assert_weights_equal,
    build,
    char_tokenizer,
    logged,
    pair_rows,
    pair_trainer,
    settings,
    sft_trainer,
    trainer_of,
)


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


# Three steps an epoch, each of two forward passes.
PACKS = {"engine": "trl", "packing": "none", "global_batch_size": 4, "micro_batch_size": 2, "max_steps": 8}
PAIRS = {"engine": "trl", "global_batch_size": 4, "max_steps": 5, "trl": TRLPreference(micro_batch_size=2)}


def of_kind(kind, tokenizer, folder, **changes):
    """A trainer, and one that goes on from its checkpoints."""
    model = build(tokenizer)
    if kind == "sft":
        first, rows, stage = sft_trainer(tokenizer, folder, copy.deepcopy(model), **PACKS, **changes)
        return first, lambda: trainer_of(stage, rows, tokenizer, folder, copy.deepcopy(model))
    ref = build(tokenizer, seed=7)
    first, rows, stage = pair_trainer(tokenizer, folder, copy.deepcopy(model), ref, **PAIRS, **changes)
    beside = preference.Reference(lambda: copy.deepcopy(ref))
    return first, lambda: trainer_of(stage, rows, tokenizer, folder, copy.deepcopy(model), beside)


@pytest.mark.parametrize("kind", ["sft", "apo"])
def test_resuming_inside_a_later_epoch_changes_no_bit(tokenizer, tmp_path, kind):
    at = {"sft": 5, "apo": 3}[kind]
    whole, again = of_kind(kind, tokenizer, tmp_path, save_steps=at)
    whole.train()
    assert 1 < whole.state.epoch != int(whole.state.epoch)
    other = again()
    other.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{at}"))
    keys = ("loss", "grad_norm", "num_tokens", "epoch", "entropy", "mean_token_accuracy")
    assert logged(other, keys) == logged(whole, keys)
    assert_same_bits(other, whole)


def assert_same_bits(found, expected):
    weights = found.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.model.state_dict().items())


@pytest.mark.parametrize("kind", ["sft", "apo"])
def test_a_signal_inside_an_accumulation_ends_training_after_the_step(tokenizer, tmp_path, monkeypatch, kind):
    whole, _ = of_kind(kind, tokenizer, tmp_path / "whole")
    whole.train()
    cut, again = of_kind(kind, tokenizer, tmp_path / "cut", save_steps=100)
    passes, step = [], cut.training_step

    def interrupted(*args, **kwargs):
        passes.append(1)
        if len(passes) == 3:  # the first pass of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(cut, "training_step", interrupted)
    with signals.handled_by(signals.stop), pytest.raises(signals.Stopped) as stop:
        cut.train()
    assert (stop.value.signum, stop.value.where, len(passes)) == (signal.SIGTERM, " at step 2", 4)
    out = tmp_path / "cut" / "out"
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-2"]
    other = again()
    other.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert_same_bits(other, whole)
    assert logged(other, ["loss", "num_tokens"]) == logged(whole, ["loss", "num_tokens"])


def test_nothing_is_sent_to_trls_makers(tokenizer, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", lambda **facts: sent.append(facts))
    monkeypatch.delenv("CI", raising=False)
    of_kind("sft", tokenizer, tmp_path / "sft")
    of_kind("apo", tokenizer, tmp_path / "apo")
    assert not sent


@pytest.mark.parametrize("stage", [SFTStage(**settings(engine="trl")), APOStage(**settings(engine="trl"))])
@pytest.mark.parametrize("bf16", [False, True])
def test_trls_own_defaults_do_not_apply(tmp_path, stage, bf16):
    """It would compute in bf16, recompute activations by itself, cut rows at 1024 tokens and switch dropout off."""
    found = stage.method().arguments(stage, 1, 10, tmp_path, dataclasses.replace(CPU, bf16=bf16))
    assert (found.bf16, found.use_cpu, found.max_length, found.remove_unused_columns) == (bf16, True, None, False)
    assert found.activation_checkpointing is found.gradient_checkpointing is False
    assert not getattr(found, "disable_dropout", False) and not found.report_to and not found.push_to_hub


@pytest.mark.parametrize("kind", ["sft", "apo"])
def test_a_padding_token_of_trls_own_does_not_stay(tmp_path, kind):
    """TRL gives tokenizer, config and generation config the end token to pad with where they have none."""
    bare = char_tokenizer()
    model_tokens = char_tokenizer()
    bare.pad_token = None
    model, ref = build(model_tokens), build(model_tokens)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    make = sft_trainer if kind == "sft" else pair_trainer
    changes = PACKS if kind == "sft" else PAIRS
    trainer, *_ = make(bare, tmp_path, model, *([ref] if kind == "apo" else []), **changes)
    trainer.train()
    assert bare.pad_token is None
    assert model.config.pad_token_id is None and model.generation_config.pad_token_id is None


# ---------------------------------------------------------------- a reference before training


def test_a_precomputed_reference_is_the_one_beside_and_leaves_the_rows_alone(tokenizer, tmp_path, monkeypatch):
    start = tmp_path / "start"
    model = build(tokenizer)
    model.save_pretrained(start)
    beside, rows, stage = pair_trainer(tokenizer, tmp_path / "beside", copy.deepcopy(model), model, **PAIRS)
    beside.train()
    stage.trl.precompute_ref_log_probs = True
    prepared = tmp_path / "beside" / "rows"
    before = hashes(prepared)
    scored = []
    compute = preference.DPO.compute_ref_log_probs
    monkeypatch.setattr(preference.DPO, "compute_ref_log_probs", lambda *args: (scored.append(1), compute(*args))[1])

    def trained(name):
        found = load_from_disk(str(prepared))
        reference, report = preference.reference(stage, found, start, None, tmp_path / "references", CPU)
        trainer = trainer_of(stage, found, tokenizer, tmp_path / name, copy.deepcopy(model), reference)
        assert trainer.ref_model is None
        trainer.train()
        return trainer, report["reference_cache"]

    first, cache = trained("first")
    keys = ["loss", "grad_norm", "rewards/chosen", "rewards/margins"]
    assert_logs_equal(logged(first, keys), logged(beside, keys))
    assert_weights_equal(first.model, beside.model)
    assert hashes(prepared) == before and len(scored) == len(rows) / 2
    assert trained("second")[1] == cache and len(scored) == len(rows) / 2  # read, not scored again
    stage.ld_alpha = 0.3
    assert trained("third")[1] != cache and len(scored) == len(rows)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", ["sft", "apo"])
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "down_proj"]], ids=["all", "two"])
def test_adapters_train_as_in_our_engine(tokenizer, tmp_path, kind, targets):
    """The reference is the model without adapters, or with TRL's copy of the untrained ones: the same."""
    lora = LoRA(r=2, alpha=8.0, target_modules=targets)
    base, trainers = build(tokenizer), []
    for engine in ("smolpost", "trl"):
        adapted = add_adapters(copy.deepcopy(base), lora, seed=3)
        changes = {**(PACKS if kind == "sft" else PAIRS), "engine": engine, "lora": lora}
        if engine == "smolpost":
            changes.pop("trl", None)
        if kind == "sft":
            trainer, *_ = sft_trainer(tokenizer, tmp_path / engine, adapted, **changes)
        else:
            trainer, *_ = pair_trainer(tokenizer, tmp_path / engine, adapted, base, pair_rows(), **changes)
        trainer.train()
        trainers.append(trainer)
    ours, trls = trainers
    assert_logs_equal(logged(trls, ["loss", "grad_norm"]), logged(ours, ["loss", "grad_norm"]))
    weights = trls.model.state_dict()
    for name, tensor in ours.model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-5, rtol=0)
    assert {n for n, p in trls.model.named_parameters() if p.requires_grad} == {
        n for n, p in ours.model.named_parameters() if p.requires_grad
    }
