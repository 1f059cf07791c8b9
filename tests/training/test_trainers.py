"""Our losses, gradients and rewards are TRL's, step for step, on transformers' own SmolLM3 with its dense masks."""

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
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from smolpost import signals
from smolpost.chat.fates import Fate
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data.collate import collate_packs
from smolpost.errors import UserError
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from smolpost.training import preference, reference, sft
from smolpost.training.arguments import training_arguments
from smolpost.training.environment import Environment
from smolpost.training.optimizer import decayed_parameters
from smolpost.training.reference_cache import ReferenceCache
from smolpost.training.train import check_space
from tests.prepared import prepared

CPU = Environment(rank=0, world_size=1, local_world_size=1, use_cpu=True, bf16=False)
ASK = {"role": "user", "content": "6*7?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "mul", "arguments": {"a": 6}}}]}
NO_THINK = {"enable_thinking": False}
SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": 0,
}  # fmt: skip
NEAR = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["abc"], kind="char", vocab_size=256, template="smollm3")


def build(tokenizer, seed=0, **changes):
    torch.manual_seed(seed)
    config = SmolLM3Config(
        **SHAPE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        **changes,
    )  # fmt: skip
    config._attn_implementation = "packed"
    return SmolLM3ForCausalLM(config)


def build_windowed(tokenizer, seed=0):
    """A Mistral whose tokens see 16 positions; most documents, and the prompts of pairs, are longer."""
    torch.manual_seed(seed)
    config = transformers.MistralConfig(
        **SHAPE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        sliding_window=16,
    )  # fmt: skip
    return transformers.MistralForCausalLM._from_config(config, attn_implementation="packed")


def stock(model):
    """transformers' model with the same weights and masks."""
    if isinstance(model, transformers.MistralForCausalLM):
        peer = copy.deepcopy(model)
        peer.set_attn_implementation("sdpa")
        return peer
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    peer = transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**fields, attn_implementation="sdpa"))
    peer.load_state_dict(model.state_dict())
    return peer


def settings(**changes):
    shared = dict(init_from="x", data="y", max_seq_len=400, learning_rate=1e-3, global_batch_size=2, max_grad_norm=1.0)
    return {**shared, "num_workers": 1, "report_to": [], "gradient_checkpointing": False, "logging_steps": 1, **changes}


def same_settings(stage, folder):
    """A stage's settings in TRL's words."""
    return dict(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, max_steps=stage.max_steps, logging_steps=1,
        learning_rate=stage.learning_rate, lr_scheduler_type="cosine_with_min_lr", warmup_steps=stage.warmup_ratio,
        lr_scheduler_kwargs={"min_lr_rate": stage.min_lr_ratio}, weight_decay=stage.weight_decay,
        adam_beta1=stage.adam_beta1, adam_beta2=stage.adam_beta2, max_grad_norm=stage.max_grad_norm,
        save_strategy="no", max_length=None, activation_checkpointing=False, remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip


def logged(trainer, keys):
    return [{key: entry[key] for key in keys} for entry in trainer.state.log_history if "loss" in entry]


def assert_logs_equal(found, expected):
    assert len(found) == len(expected) > 2
    for step, wanted in zip(found, expected, strict=True):
        for key, value in wanted.items():
            assert step[key] == pytest.approx(value, abs=1e-5, rel=1e-5), key


# ---------------------------------------------------------------- sft


def conversation(reply):
    return [ASK, {"role": "assistant", "content": reply}]


def packs(tokenizer, folder, stage):
    rows = [("a", {"messages": conversation("x" * n), "chat_template_kwargs": NO_THINK}) for n in range(1, 13)]
    folder.mkdir(parents=True)
    return prepared(stage, rows, tokenizer, folder)[0]


def sft_trainer(tokenizer, folder, model, **changes):
    stage = SFTStage(**settings(**changes))
    rows = packs(tokenizer, folder / "rows", stage)
    arguments = training_arguments(stage, 1, len(rows), folder / "out", CPU)
    return sft.trainer(stage, model, tokenizer, rows, None, arguments, 1, CPU), rows, stage


class SameDecay(SFTTrainer):
    """TRL decays the embedding; the comparison is about the loss."""

    def get_decay_parameter_names(self, model):
        return decayed_parameters(model)


@pytest.mark.parametrize("make", [build, build_windowed])
def test_sft_steps_equal_trls(tokenizer, tmp_path, make):
    """Loss, gradient norm, accuracy and entropy of every step, the last one shorter than the others."""
    model = make(tokenizer)
    peer = stock(model)
    changes = {"max_seq_len": 420, "global_batch_size": 4, "shuffle_packs": False, "max_steps": 5}
    trainer, rows, stage = sft_trainer(tokenizer, tmp_path, model, **changes)
    assert len(rows) % 4  # the epoch ends with a smaller batch
    trainer.train()
    trl = SameDecay(
        model=peer, train_dataset=rows, processing_class=tokenizer,
        data_collator=lambda taken: {k: v for k, v in collate_packs(taken).items() if k != "document_lengths"},
        args=SFTConfig(
            **same_settings(stage, tmp_path / "trl"), per_device_train_batch_size=4,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
    )  # fmt: skip
    trl.train()
    keys = ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens")
    assert_logs_equal(logged(trainer, keys), logged(trl, keys))
    for name, tensor in peer.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=2e-5, rtol=0)


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


def tool_pair():
    chosen = [ASK, CALL, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "forty-two"}]
    rejected = [ASK, CALL, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "forty"}]
    return {"chosen": chosen, "rejected": rejected, "chat_template_kwargs": NO_THINK}


def pair_rows():
    rows = [tool_pair()]
    replies = [("42", "7"), ("it is 42", "it is 48, I think"), ("yes " * 9, "no"), ("a", "b"), ("x" * 30, "y")]
    for good, bad in [*replies, ("forty two", "forty"), ("q", "q" * 40)]:
        rows.append({"chosen": conversation(good), "rejected": conversation(bad), "chat_template_kwargs": NO_THINK})
    return [("a", row) for row in rows]


def padded_pairs(tokenizer):
    """TRL's layout of our rows: two whole sequences a pair, with a mask that leaves out tool turns."""

    def collate(pairs):
        ids, masks = [], []
        for side in ("chosen", "rejected"):
            for pair in pairs:
                ids.append(torch.tensor(pair["prompt_ids"] + pair[f"{side}_ids"]))
                masks.append(torch.tensor(pair["prompt_mask"] + pair[f"{side}_mask"]))
        pad = lambda rows, value: pad_sequence(rows, batch_first=True, padding_value=value)  # noqa: E731
        return {
            "input_ids": pad(ids, tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
            "completion_mask": pad(masks, 0),
        }

    return collate


class TokenizedPairs(DPOTrainer):
    """TRL's trainer on rows that are tokenized already."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset

    def get_decay_parameter_names(self, model):
        return decayed_parameters(model)


def pair_trainer(tokenizer, folder, model, ref_model, **changes):
    stage = APOStage(**settings(global_batch_size=4, **changes))
    rows, _ = prepared(stage, pair_rows(), tokenizer, folder)
    cache = ReferenceCache(folder / "cache", "k", reference.scored_tokens(rows))
    reference.fill(cache, rows, lambda: copy.deepcopy(ref_model), 150, CPU)
    cache.open()
    arguments = training_arguments(stage, 1, len(rows), folder / "out", CPU)
    return preference.trainer(stage, model, tokenizer, rows, cache, arguments, 1, CPU), rows, stage


LOSSES = [
    ({"loss": "apo_zero"}, {}),
    ({"loss": "apo_down"}, {}),
    ({"loss": "sigmoid"}, {}),
    ({"loss": "ipo"}, {}),
    ({"loss": "robust", "loss_settings": {"label_smoothing": 0.2}}, {"label_smoothing": 0.2}),
    ({"loss": "sigmoid", "ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    ({"loss": "apo_zero", "sft_weight": 0.7}, {"loss_type": ["apo_zero", "sft"], "loss_weights": [1.0, 0.7]}),
]


@pytest.mark.parametrize(("ours", "trls"), LOSSES, ids=lambda case: "-".join(map(str, case.values())) or None)
@pytest.mark.parametrize("pack_tokens", [60, 1000], ids=["many packs", "one pack"])
def test_preference_steps_equal_trls(tokenizer, tmp_path, ours, trls, pack_tokens):
    assert_preference_steps_equal(tokenizer, tmp_path, build, ours, trls, pack_tokens)


def test_preference_steps_under_a_sliding_window_equal_trls(tokenizer, tmp_path):
    assert_preference_steps_equal(tokenizer, tmp_path, build_windowed, {"loss": "apo_zero"}, {}, 1000)


def test_steps_of_a_registered_loss_equal_trls(hinge, tokenizer, tmp_path):
    assert_preference_steps_equal(tokenizer, tmp_path, build, {"loss": "hinge"}, {}, 60)


def assert_preference_steps_equal(tokenizer, tmp_path, make, ours, trls, pack_tokens):
    """Loss, gradient norm, rewards and log-probabilities of every step, with a reference unlike the policy."""
    model, ref_model = make(tokenizer), make(tokenizer, seed=7)
    peer, peer_ref = stock(model), stock(ref_model)
    changes = {**ours, "beta": 0.3, "max_steps": 4, "pack_tokens": pack_tokens}
    trainer, rows, stage = pair_trainer(tokenizer, tmp_path, model, ref_model, **changes)
    order = []  # of two epochs
    for epoch in range(2):
        trainer.batches.set_epoch(epoch)
        order += trainer.batches.order().tolist()
    trainer.train()
    trl = TokenizedPairs(
        model=peer, ref_model=peer_ref, train_dataset=rows.select(order), processing_class=tokenizer,
        data_collator=padded_pairs(tokenizer),
        args=DPOConfig(
            **same_settings(stage, tmp_path / "trl"), per_device_train_batch_size=4, beta=0.3,
            **{"loss_type": [stage.loss], **trls},
        ),
    )  # fmt: skip
    trl.train()
    keys = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    keys += ["logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy"]
    assert_logs_equal(logged(trainer, keys), logged(trl, keys))
    for name, tensor in peer.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=2e-5, rtol=0)


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
        ({}, False, 3 * 3 + 1),  # two checkpoints and one in the making: weights and two moments; the final weights
        ({}, True, 3 * 3 + 0.5),
        ({"save_steps": 6}, False, 3 * 2 + 1),  # no more than two are ever saved
        ({"snapshot_steps": 4}, False, 3 * 3 + 1 + 3),
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
    needed = 4 * (9 * 16 + sum(p.numel() for p in model.parameters()))
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
