"""GRPO equals TRL's trainer called directly on text, goes on to the bit after a resume, and learns what is rewarded."""

import copy

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from smolpost.errors import UserError
from smolpost.training.adapters import add_adapters
from smolpost.training.optimizer import decayed_parameters
from smolpost.training.settings import LoRA, PolicyTraining
from smolpost.training.with_trl import grpo
from tests.training.tiny_trainers import (
    CPU,
    assert_logs_equal,
    assert_weights_equal,
    build,
    char_tokenizer,
    in_trls_words,
    logged,
)

NUM_ROWS = 8
END = "5"
KEYS = ["loss", "grad_norm", "reward", "reward_std", "completions/mean_length", "entropy", "num_tokens"]


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


@pytest.fixture(scope="module")
def start(tokenizer):
    model = build(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.fixture(scope="module")
def rows(tokenizer):
    prompts = ["ab" * (n % 3 + 1) for n in range(NUM_ROWS)]
    return Dataset.from_dict(
        {"prompt_ids": tokenizer(prompts).input_ids, "completion_ids": tokenizer(["a"] * 8).input_ids}
    )


def stage_of(**changes) -> PolicyTraining:
    shared = {
        "init_from": "x", "data": "y", "max_seq_len": 100, "learning_rate": 1e-3, "max_grad_norm": 1.0, "max_steps": 4,
        "global_batch_size": 2, "report_to": [], "activation_checkpointing": "none", "logging_steps": 1,
        "num_generations": 4, "max_new_tokens": 6, "micro_batch_size": 4,
        "rewards": {"starts": 1.0, "soft_overlong": 0.5}, "reward_settings": {"soft_overlong": {"buffer": 6}},
    }  # fmt: skip
    return PolicyTraining(**shared | changes)


@pytest.fixture(autouse=True)
def starts(monkeypatch):
    """A reward that random replies earn now and then: the first character is early in the alphabet."""
    from smolpost.registry import REWARDS
    from smolpost.training.rewards import Reward

    class Starts(Reward):
        def value(self, rollout):
            return float(rollout.reply[:1] < END)

    monkeypatch.setitem(REWARDS._entries, "starts", Starts)


def trained(stage, rows, tokenizer, model, folder, resume=None) -> grpo.GRPO:
    grpo.check("g", stage, rows, CPU)
    arguments = grpo.arguments(stage, 1, len(rows), folder, CPU)
    trainer = grpo.trainer(stage, model, tokenizer, rows, None, arguments, 1, CPU)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class SameDecay(GRPOTrainer):
    """TRL decays the embedding; the comparison is about samples, rewards and loss."""

    def get_decay_parameter_names(self, model):
        return decayed_parameters(model)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
def test_steps_are_trls_on_text(tokenizer, start, rows, tmp_path, loss):
    """Same prompts in the same order, same random numbers: the same replies, so the same numbers."""
    model, peer = copy.deepcopy(start), copy.deepcopy(start)
    stage = stage_of(loss=loss)
    trainer = trained(stage, rows, tokenizer, model, tmp_path / "ours")
    trainer.batches.set_epoch(0)
    texts = [tokenizer.decode(rows[i]["prompt_ids"]) for i in trainer.batches.order().tolist()]

    def early(completions, **_):
        return [float(text[:1] < END) for text in completions]

    def short(completion_ids, **_):
        return [min(0.0, max(-1.0, (6 - 6 - len(ids)) / 6)) for ids in completion_ids]

    arguments = GRPOConfig(
        **in_trls_words(stage, tmp_path / "trl"), seed=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        num_generations=4, max_completion_length=6, shuffle_dataset=False, loss_type=loss, reward_weights=[1.0, 0.5],
    )  # fmt: skip
    direct = SameDecay(
        model=peer, reward_funcs=[early, short], args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": texts}),
    )  # fmt: skip
    direct.train()
    assert_logs_equal(logged(trainer, KEYS), logged(direct, KEYS))
    assert len({entry["reward"] for entry in logged(trainer, ["reward"])}) > 1
    assert_weights_equal(model, peer)


def test_resumed_is_uninterrupted_to_the_bit(tokenizer, start, rows, tmp_path):
    """Cut in the second epoch: the order, the replies and the moments have to be found again."""
    stage = stage_of(max_steps=7, save_steps=5)
    whole = trained(stage, rows, tokenizer, copy.deepcopy(start), tmp_path)
    cut = trained(stage, rows, tokenizer, copy.deepcopy(start), tmp_path, resume=str(tmp_path / "checkpoint-5"))
    assert logged(cut, KEYS) == logged(whole, KEYS)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(cut.model.state_dict()[name], tensor), name


def test_what_is_rewarded_becomes_frequent(tokenizer, start, rows, tmp_path):
    stage = stage_of(max_steps=60, learning_rate=2e-2, num_generations=8, micro_batch_size=16, rewards={"starts": 1.0},
                     reward_settings={}, lr_scheduler="constant", weight_decay=0)  # fmt: skip
    trainer = trained(stage, rows, tokenizer, copy.deepcopy(start), tmp_path)
    rewards = [entry["reward"] for entry in logged(trainer, ["reward"])]
    assert sum(rewards[:5]) / 5 < 0.6 and sum(rewards[-5:]) / 5 > 0.9


def test_adapters_alone_are_trained(tokenizer, start, rows, tmp_path):
    model = add_adapters(copy.deepcopy(start), LoRA(r=4), 1)
    trainer = trained(stage_of(beta=0.1), rows, tokenizer, model, tmp_path)
    assert all(entry["grad_norm"] > 0 for entry in logged(trainer, ["grad_norm"]))
    for name, tensor in start.state_dict().items():
        base = name.replace("_proj.weight", "_proj.base_layer.weight")
        assert torch.equal(model.get_base_model().state_dict()[base], tensor), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch_size": 3}, "8 replies per step .* are not a multiple of 3"),
        ({"global_batch_size": 3, "max_steps": None}, "8 rows leave 2 for the last step .*max_steps=2"),
    ],
)
def test_what_does_not_come_out_even_is_refused(rows, changes, words):
    with pytest.raises(UserError, match=words):
        grpo.check("g", stage_of(**changes), rows, CPU)
