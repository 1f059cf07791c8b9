"""KTO as a stage: TRL's KTOTrainer on our rows, in our order, with our masks."""

from dataclasses import fields
from typing import ClassVar

import pytest
import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from smolpost.data.settings import LabelledRows
from smolpost.errors import UserError, Wrong
from smolpost.stages.kto import KTOStage
from smolpost.training.adapters import add_adapters
from smolpost.training.settings import LoRA
from smolpost.training.with_trl.kto import collate_labelled, imbalance
from tests.prepared import prepared
from tests.training.tiny_trainers import (
    ASK,
    CPU,
    REPLIES,
    assert_logs_equal,
    assert_weights_equal,
    build,
    char_tokenizer,
    conversation,
    in_trls_words,
    logged,
    settings,
    stock,
    tool_pair,
    trainer_of,
)

KEYS = ["loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "entropy"]


@pytest.fixture(scope="module")
def chatml():
    return char_tokenizer("chatml")


def pair_rows():
    return [{"chosen": conversation(good), "rejected": conversation(bad)} for good, bad in REPLIES[:6]]


def kto_stage(**changes):
    return KTOStage(**settings(**{"global_batch_size": 4, "micro_batch_size": 2, "template": "chatml"} | changes))


def kto_trainer(tokenizer, folder, model, ref_model, rows=None, **changes):
    stage = kto_stage(**changes)
    folder.mkdir(exist_ok=True)
    found, _ = prepared(stage, rows or pair_rows(), tokenizer, folder)
    return trainer_of(stage, found, tokenizer, folder, model, lambda: ref_model), found, stage


def orders(trainer, epochs):
    """The rows of several epochs in the order of the trainer's batches."""
    rows = []
    for epoch in range(epochs):
        trainer.batches.set_epoch(epoch)
        rows += trainer.batches.order().tolist()
    return rows


# ---------------------------------------------------------------- beside TRL called directly


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch_size": 4, "desirable_weight": 1.5},
        {"loss": "apo_zero_unpaired", "micro_batch_size": 1, "undesirable_weight": 0.5},
    ],
    ids=["kto", "kto-weighted", "apo_zero_unpaired"],
)
def test_steps_are_trls_on_text(chatml, tmp_path, changes):
    """TRL renders nothing: it gets prompts and completions as text in our order of two epochs, and masks them."""
    changes = {"beta": 0.3, "max_steps": 5, "weight_decay": 0} | changes
    model, ref_model = build(chatml), build(chatml, seed=7)
    peer, peer_ref = stock(model), stock(ref_model)
    engine, _, stage = kto_trainer(chatml, tmp_path / "engine", model, ref_model, **changes)
    order = orders(engine, 2)
    assert order[:12] != order[12:]
    engine.train()
    prompt = chatml.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    completions = [(reply, label) for pair in REPLIES[:6] for reply, label in zip(pair, (True, False), strict=True)]
    texts = [
        {"prompt": prompt, "completion": completions[row][0] + chatml.eos_token, "label": completions[row][1]}
        for row in order
    ]
    arguments = KTOConfig(
        **in_trls_words(stage, tmp_path / "trl"), max_length=None, per_device_train_batch_size=stage.micro_batch_size,
        gradient_accumulation_steps=4 // stage.micro_batch_size, beta=0.3, loss_type=stage.loss,
        desirable_weight=stage.desirable_weight, undesirable_weight=stage.undesirable_weight,
    )  # fmt: skip
    direct = KTOTrainer(
        model=peer, ref_model=peer_ref, args=arguments, train_dataset=Dataset.from_list(texts), processing_class=chatml
    )
    direct.train()
    keys = KEYS if stage.micro_batch_size > 1 else ["loss", "grad_norm", "entropy"]
    assert_logs_equal(logged(engine, keys), logged(direct, keys))
    assert_weights_equal(model, peer)


def test_the_first_loss_by_hand(chatml, tmp_path):
    """Two completions, policy and reference apart: equations 7 and 8 of arXiv:2402.01306, from logits alone."""
    model, ref_model = build(chatml), build(chatml, seed=7)
    plain, plain_ref = stock(model), stock(ref_model)
    changes = {"beta": 0.5, "desirable_weight": 1.2, "undesirable_weight": 0.7, "global_batch_size": 2, "max_steps": 1}
    rows = [{"messages": conversation("42"), "label": True}, {"messages": conversation("it is 7"), "label": False}]
    trainer, found, _ = kto_trainer(chatml, tmp_path, model, ref_model, rows, **changes)
    trainer.train()

    @torch.no_grad()
    def ratio(prompt, completion):
        """Log-ratio of policy and reference of a completion, nats."""
        ids = torch.tensor([prompt["prompt_ids"] + completion["completion_ids"]])
        start, logps = len(prompt["prompt_ids"]), []
        for peer in (plain, plain_ref):
            scores = peer(input_ids=ids).logits[0, start - 1 : -1].double().log_softmax(-1)
            logps.append(scores.gather(1, ids[0, start:, None]).sum())
        return logps[0] - logps[1]

    good, bad = found[0], found[1]
    kl = max(0.0, float((ratio(good, bad) + ratio(bad, good)) / 2))  # each prompt with the other's completion
    desired = 1.2 * (1 - torch.sigmoid(0.5 * (ratio(good, good) - kl)))
    undesired = 0.7 * (1 - torch.sigmoid(0.5 * (kl - ratio(bad, bad))))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float((desired + undesired) / 2), abs=1e-5)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(kl, abs=1e-4)


def test_at_the_reference_the_loss_is_half(chatml, tmp_path):
    model = build(chatml)
    trainer, _, _ = kto_trainer(chatml, tmp_path, model, stock(model), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------- masks and mismatched sequences


def test_user_and_tool_turns_inside_a_completion_do_not_count(tmp_path):
    tokenizer = char_tokenizer()
    pair = tool_pair()
    rows = [
        {"messages": pair[side], "completion_turns": 3, "label": side == "chosen"} for side in ("chosen", "rejected")
    ]
    rows = [row | {"chat_template_kwargs": pair["chat_template_kwargs"]} for row in rows]
    found, _ = prepared(kto_stage(template="smollm3", max_seq_len=1000), rows, tokenizer, tmp_path)
    batch = collate_labelled([found[0], found[1]], max_seq_len=1000, with_kl=True)
    assert batch["label"].tolist() == [True, False]
    texts = [
        tokenizer.decode(batch[f"{kl}input_ids"][i][batch[f"{kl}completion_mask"][i] == 1])
        for kl in ("", "KL_")
        for i in range(2)
    ]
    assert texts[0].count("<|im_end|>") == 2 and texts[0].endswith("forty-two<|im_end|>")
    assert texts[1].endswith("forty<|im_end|>") and "tool" not in texts[0].replace("tool_call", "")
    assert texts[2:] == texts[1::-1]  # each prompt with the completion of the row before it


def test_mismatched_sequences_are_cut_at_the_longest_length():
    rows = [
        {"prompt_ids": [1] * 6, "completion_ids": [2], "completion_mask": [1], "label": [1]},
        {"prompt_ids": [3], "completion_ids": [4] * 6, "completion_mask": [1] * 6, "label": [0]},
        {"prompt_ids": [5, 5], "completion_ids": [6, 7], "completion_mask": [0, 1], "label": [0]},
    ]
    batch = collate_labelled(rows, max_seq_len=7, with_kl=True)
    assert batch["KL_input_ids"].tolist() == [[1] * 6 + [6], [3, 2, 0, 0, 0, 0, 0], [5, 5, 4, 4, 4, 4, 4]]
    assert batch["KL_completion_mask"].tolist() == [[0] * 7, [0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert batch["KL_attention_mask"].sum(1).tolist() == [7, 2, 7]
    assert set(collate_labelled(rows, max_seq_len=7, with_kl=False)) == {
        "input_ids", "attention_mask", "completion_mask", "label",
    }  # fmt: skip


# ---------------------------------------------------------------- settings


def test_refusals(chatml, tmp_path):
    for changes, said in (
        ({"micro_batch_size": 1}, "=1 leaves a prompt no other completion"),
        ({"global_batch_size": 3}, "=3 is not a multiple of micro_batch_size=2"),
        ({"overlong": "split"}, "=split cannot be done to a completion"),
    ):
        with pytest.raises(Wrong, match=said):
            kto_stage(**changes).check("stages.kto", _Recipe, None)
    kto_stage(micro_batch_size=1, loss="apo_zero_unpaired").check("stages.kto", _Recipe, None)
    rows = [*pair_rows(), {"messages": conversation("odd"), "label": True}]
    with pytest.raises(UserError, match=r"13 rows leave 1 for the last step .* not a multiple of 2") as refused:
        kto_trainer(chatml, tmp_path, build(chatml), None, rows)
    assert "engine" not in str(refused.value)  # there is no other


class _Recipe:
    data: ClassVar[dict] = {}


def test_labels_out_of_balance_are_said(chatml, tmp_path):
    rows = [{"messages": conversation("4" * n), "label": n > 6} for n in range(1, 9)]
    found, _ = prepared(kto_stage(), rows, chatml, tmp_path)
    line = imbalance("kto", kto_stage(), found)
    assert line == (
        "stages.kto: 2 desired and 6 undesired completions weigh 0.333 to 1 with desirable_weight=1 and "
        "undesirable_weight=1; KTO's paper advises 1 to 1.33: stages.kto.desirable_weight between 3 and 4"
    )
    for weight, is_fine in ((3.0, True), (3.9, True), (2.9, False), (4.1, False)):
        assert (imbalance("kto", kto_stage(desirable_weight=weight), found) == "") == is_fine


def test_rows_are_the_layout_of_the_stage():
    assert KTOStage.ROWS is LabelledRows and KTOStage.layout == "labelled"
    assert kto_stage().engine == "trl" and "engine" not in {field.name for field in fields(KTOStage)}


def test_adapters_train_beside_the_start_without_a_second_model(chatml, tmp_path):
    start = build(chatml)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    lora = LoRA(r=4, alpha=8.0)
    model = add_adapters(start, lora, 1)
    trainer, _, _ = kto_trainer(chatml, tmp_path, model, None, lora=lora, max_steps=3, learning_rate=1e-2)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-6)  # the adapters begin at the reference
    assert steps[0]["rewards/chosen"] == 0 and abs(steps[-1]["rewards/chosen"]) > 1e-4  # and leave it
    base = model.get_base_model().state_dict()
    frozen = [name for name in before if name in base]
    assert frozen and all(torch.equal(base[name], before[name]) for name in frozen)
    assert CPU.world_size == 1 and trainer.ref_model is None
