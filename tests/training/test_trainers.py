"""Our engine: its batches, loss, resumption and end at a signal. `test_trl_engine.py` has its steps beside TRL's."""

import copy
import dataclasses
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import load_from_disk

from smolpost import signals
from smolpost.chat.fates import Fate
from smolpost.data.collate import collate_packs
from smolpost.errors import UserError
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from smolpost.training import preference, reference, sft
from smolpost.training.arguments import training_arguments
from smolpost.training.optimizer import decayed_parameters
from smolpost.training.reference_cache import ReferenceCache
from smolpost.training.train import check_space
from tests.prepared import prepared
from tests.training import tiny_trainers
from tests.training.tiny_trainers import (
    CPU,
    NO_THINK,
    build,
    char_tokenizer,
    conversation,
    logged,
    pair_rows,
    pair_trainer,
    settings,
    sft_trainer,
)

NEAR = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


# ---------------------------------------------------------------- sft


def test_resuming_inside_a_later_epoch_changes_nothing(tokenizer, tmp_path):
    """Three steps an epoch, cut after the fifth: the second epoch's order has to be found again."""
    model = build(tokenizer)
    changes = {"max_seq_len": 420, "global_batch_size": 2, "max_steps": 8, "save_steps": 5}
    trainer, _, stage = sft_trainer(tokenizer, tmp_path, model, **changes)
    trainer.train()
    again = build(tokenizer, seed=9)
    rows = load_from_disk(str(tmp_path / "rows" / "rows"))
    arguments = training_arguments(stage, 1, len(rows), tmp_path / "out", CPU)
    other = sft.trainer(stage, again, tokenizer, rows, None, arguments, 1, CPU)
    other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert len(other.batches) == 3 and other.batches.epoch == 2
    keys = ("loss", "grad_norm", "num_tokens", "epoch")
    assert logged(other, keys) == logged(trainer, keys)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-7, rtol=0)


class SignalAt(transformers.TrainerCallback):
    """A signal in the middle of a step."""

    def __init__(self, step, *signals):
        self.step, self.signals = step, signals

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for number in self.signals:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("step", [3, 5, 9], ids=["inside an epoch", "at its end", "the last step"])
def test_a_signal_ends_training_after_its_step_and_changes_nothing(tokenizer, tmp_path, step):
    """No save was due: the checkpoint is of the step in which the signal came. Copies at once are the same wish."""
    words = {"max_steps": 9, "global_batch_size": 1, "save_steps": 100, "logging_steps": 4, "max_seq_len": 420}
    model = build(tokenizer)
    whole, _, _ = sft_trainer(tokenizer, tmp_path / "whole", copy.deepcopy(model), **words)
    whole.train()
    before = [signal.getsignal(number) for number in signals.ENDING]
    cut, rows, stage = sft_trainer(tokenizer, tmp_path / "cut", copy.deepcopy(model), **words)
    cut.add_callback(SignalAt(step, signal.SIGHUP, signal.SIGTERM, signal.SIGINT))
    with signals.handled_by(signals.stop), pytest.raises(signals.Stopped) as stop:
        cut.train()
    assert (stop.value.signum, stop.value.where) == (signal.SIGHUP, f" at step {step}")
    assert [signal.getsignal(number) for number in signals.ENDING] == before
    assert [folder.name for folder in (tmp_path / "cut" / "out").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    arguments = training_arguments(stage, 1, len(rows), tmp_path / "cut" / "out", CPU)
    again = sft.trainer(stage, copy.deepcopy(model), tokenizer, rows, None, arguments, 1, CPU)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "out" / f"checkpoint-{step}"))
    assert again.state.global_step == 9
    assert again.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_a_second_signal_ends_training_at_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "COPIES", 0.0)
    trainer, _, _ = sft_trainer(tokenizer, tmp_path, build(tokenizer), max_steps=9, max_seq_len=420)
    trainer.add_callback(SignalAt(1, signal.SIGTERM, signal.SIGTERM))
    with signals.handled_by(signals.stop), pytest.raises(signals.Stopped):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.glob("out/checkpoint-*"))


def test_a_signal_before_the_first_step_waits_for_no_step(tokenizer, tmp_path, monkeypatch):
    trainer, _, _ = sft_trainer(tokenizer, tmp_path, build(tokenizer), max_steps=9, max_seq_len=420)
    monkeypatch.setattr(trainer, "create_optimizer", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with signals.handled_by(signals.stop), pytest.raises(signals.Stopped):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.glob("out/checkpoint-*"))


def test_speed_counts_the_rows_steps_and_tokens_of_this_run(tokenizer, tmp_path):
    """Two epochs whose last batches are smaller; then the same from the middle, where only what is new counts."""
    changes = {"max_seq_len": 420, "global_batch_size": 4, "num_epochs": 2, "save_steps": 3, "shuffle_packs": False}
    trainer, rows, stage = sft_trainer(tokenizer, tmp_path, build(tokenizer), **changes)
    lengths = [len(ids) for ids in rows["input_ids"]]
    size, last = len(rows), len(rows) % 4
    assert len(trainer.batches) == 2 and last

    def counted(trainer):
        speed = trainer.state.log_history[-1]
        seconds = speed["train_runtime"]
        return [speed[f"train_{what}_per_second"] * seconds for what in ("samples", "steps", "tokens")]

    trainer.train()
    assert counted(trainer) == pytest.approx([2 * size, 4, 2 * sum(lengths)], rel=1e-2)
    arguments = training_arguments(stage, 1, size, tmp_path / "out", CPU)
    other = sft.trainer(stage, build(tokenizer), tokenizer, rows, None, arguments, 1, CPU)
    other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert counted(other) == pytest.approx([last, 1, sum(lengths[-last:])], rel=1e-2)


def test_batches_are_the_prepared_packs(tokenizer, tmp_path):
    trainer, rows, _ = sft_trainer(tokenizer, tmp_path, build(tokenizer), shuffle_packs=False)
    steps = list(trainer.get_train_dataloader())
    for i, passes in enumerate(steps):  # of two packs, one a pass, in any order
        packs = [rows[j] for j in (2 * i, 2 * i + 1)]
        labels = [np.where(np.array(p["fates"]) == Fate.TRAINED, p["input_ids"], -100).tolist() for p in packs]
        for key, expected in {"input_ids": [p["input_ids"] for p in packs], "labels": labels}.items():
            found = sorted(batch[key][0].tolist() for batch, counts in passes if counts)
            assert found == sorted(expected)
    assert 2 * len(steps) == len(rows)


def test_sft_loss_is_the_mean_over_trained_tokens(tokenizer, tmp_path):
    model = build(tokenizer)
    trainer, rows, _ = sft_trainer(tokenizer, tmp_path, model)
    batch = collate_packs(list(rows))
    logits = build(tokenizer)(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    expected = F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100)
    totals = torch.tensor([*trainer.count(batch), 0])
    torch.testing.assert_close(trainer.compute_loss(model, (batch, True), num_items_in_batch=totals), expected, **NEAR)


# ---------------------------------------------------------------- apo


def test_first_apo_loss_is_one(tokenizer, tmp_path):
    model = build(tokenizer)
    trainer, _, _ = pair_trainer(tokenizer, tmp_path, model, copy.deepcopy(model), max_steps=1)
    trainer.train()
    assert logged(trainer, ["loss"])[0]["loss"] == pytest.approx(1, abs=1e-6)


def test_weight_decay_spares_embeddings_norms_and_biases(tokenizer):
    names = set(decayed_parameters(build(tokenizer, attention_bias=True, tie_word_embeddings=False)))
    layers = {f"model.layers.{i}." for i in range(4)}
    matrices = {f"self_attn.{p}_proj.weight" for p in "qkvo"} | {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert names == {layer + matrix for layer in layers for matrix in matrices} | {"lm_head.weight"}
    tied = build(tokenizer, tie_word_embeddings=True)
    assert not any("embed" in name or "lm_head" in name for name in decayed_parameters(tied))


def test_trainers_use_these_parameter_groups(tokenizer, tmp_path):
    trainer, _, _ = sft_trainer(tokenizer, tmp_path, build(tokenizer), weight_decay=0.1)
    decayed, spared = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    embedding = trainer.model.model.embed_tokens.weight
    assert any(p is embedding for p in spared["params"]) and not any(p is embedding for p in decayed["params"])


def test_wsd_decays_over_its_share_of_the_steps(tmp_path):
    stage = SFTStage(
        **settings(lr_scheduler="wsd", decay_ratio=0.25, num_epochs=2, global_batch_size=3, micro_batch_size=3)
    )
    kwargs = training_arguments(stage, 0, 10, tmp_path, CPU).lr_scheduler_kwargs
    assert kwargs == {"num_decay_steps": 2, "min_lr_ratio": 0.1, "decay_type": "linear"}  # 2 x ceil(10 / 3) steps


@pytest.mark.parametrize(
    ("changes", "bf16", "copies"),
    [
        ({}, False, 3 * 3),  # two checkpoints and one in the making: weights and two moments
        ({"save_steps": 6}, False, 3 * 2),  # one, and one that a signal may ask for
        ({"save_steps": 12}, False, 3),  # the last step saves none
        ({"snapshot_steps": 4}, False, 3 * 3 + 2),
        ({"snapshot_steps": 4}, True, 3 * 3 + 2 * 0.5),
    ],
)
def test_a_disk_without_room_for_the_checkpoints_is_refused(tokenizer, tmp_path, monkeypatch, changes, bf16, copies):
    model, stage = build(tokenizer), SFTStage(**settings(**{"save_steps": 1, "max_steps": 12} | changes))
    here = dataclasses.replace(CPU, bf16=bf16)
    needed = int(4 * sum(p.numel() for p in model.parameters()) * copies)
    free = [needed]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[0]))
    check_space("sft", stage, model, 12, tmp_path, here)
    free[0] -= 1
    with pytest.raises(UserError, match=r"GB free; free some, lower stages.sft.save_total_limit=2"):
        check_space("sft", stage, model, 12, tmp_path, here)
    # What a killed try left is a part of what is needed.
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "state").write_bytes(b"x")
    check_space("sft", stage, model, 12, tmp_path, here)


def test_adapters_need_little_room(tokenizer, tmp_path, monkeypatch):
    model, stage = build(tokenizer), SFTStage(**settings(save_steps=1, max_steps=12))
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.model.norm.weight.requires_grad = True  # 16 elements
    needed = 4 * (2 * 3 * 16 + sum(p.numel() for p in model.parameters()))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))
    check_space("sft", stage, model, 12, tmp_path, CPU)


# ---------------------------------------------------------------- loss weights of sources


def weighted_step(tokenizer, folder, kind, rows, weights, **changes):
    """Loss and gradient norm of one step on all rows."""
    folder.mkdir()
    stage = kind(**settings(max_steps=1, **changes))
    found, _ = prepared(stage, rows, tokenizer, folder, {name: {"loss_weight": w} for name, w in weights.items()})
    model, stage.global_batch_size = build(tokenizer), len(found)
    arguments = training_arguments(stage, 1, len(found), folder / "out", CPU)
    if kind is SFTStage:
        trainer = sft.trainer(stage, model, tokenizer, found, None, arguments, 1, CPU)
    else:
        cache = ReferenceCache(folder / "cache", "k", reference.scored_tokens(found))
        reference.fill(cache, found, lambda: build(tokenizer, seed=7), 150, CPU)
        cache.open()
        trainer = preference.trainer(stage, model, tokenizer, found, cache, arguments, 1, CPU)
    trainer.train()
    return [trainer.state.log_history[0][key] for key in ("loss", "grad_norm")]


def texts(name, sizes):
    return [(name, {"messages": conversation("y" * n), "chat_template_kwargs": NO_THINK}) for n in sizes]


@pytest.mark.parametrize("kind, changes", [(SFTStage, {"packing": "none"}), (APOStage, {"sft_weight": 0.3})])
def test_a_weight_of_two_counts_as_the_same_rows_twice(tokenizer, tmp_path, kind, changes):
    if kind is SFTStage:
        a, b = texts("a", (3, 8)), texts("b", (5, 1, 9))
    else:
        rows = [row for _, row in pair_rows()]
        a, b = [("a", row) for row in rows[:2]], [("b", row) for row in rows[2:5]]
    weighted = weighted_step(tokenizer, tmp_path / "weighted", kind, a + b, {"a": 2.0, "b": 1.0}, **changes)
    twice = weighted_step(tokenizer, tmp_path / "twice", kind, a + a + b, {}, **changes)
    once = weighted_step(tokenizer, tmp_path / "once", kind, a + b, {}, **changes)
    assert weighted == pytest.approx(twice, rel=1e-5)
    assert abs(weighted[0] - once[0]) > 1e-4


def test_autocast_keeps_no_copies_of_the_weights(monkeypatch, tmp_path):
    """Its cache would hold all weights in bf16 until the forward pass ends, and each is read once."""
    monkeypatch.setattr(tiny_trainers, "CPU", dataclasses.replace(tiny_trainers.CPU, bf16=True))
    tokenizer = tiny_trainers.char_tokenizer()
    model, seen = tiny_trainers.build(tokenizer), []
    model.model.layers[0].register_forward_pre_hook(
        lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
    )
    run, *_ = tiny_trainers.sft_trainer(tokenizer, tmp_path, model, max_steps=1)
    run.train()
    assert seen and set(seen) == {(True, False)}
