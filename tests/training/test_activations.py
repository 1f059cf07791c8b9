"""Every policy gives the loss and the gradients of keeping everything, and keeps what it says."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from smolpost.errors import UserError
from smolpost.training.activations import apply, checkpointed_layers
from smolpost.training.adapters import add_adapters
from smolpost.training.settings import POLICIES, LoRA
from tests.training.tiny_trainers import (
    build,
    build_llama,
    build_qwen3,
    build_windowed,
    char_tokenizer,
    pair_trainer,
    sft_trainer,
)

MODELS = {"smollm3": build, "qwen3": build_qwen3, "llama": build_llama, "windowed": build_windowed}
ADAPTERS = LoRA(r=2, target_modules=["q_proj", "down_proj"])
RECOMPUTING = POLICIES[1:]


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


def step(trainer, bf16: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first optimizer step, all passes of it."""
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = float(trainer.training_step(trainer.model, batch))
    return loss, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def first_step(kind: str, model, policy: str, tokenizer, folder, bf16: bool):
    apply("s", model, policy)
    if kind == "sft":
        trainer, _, _ = sft_trainer(tokenizer, folder, model)
    else:
        trainer, _, _ = pair_trainer(tokenizer, folder, model, build(tokenizer, seed=5))
    return step(trainer, bf16)


@pytest.mark.parametrize("policy", RECOMPUTING)
@pytest.mark.parametrize(
    ("kind", "name", "bf16"),
    [
        ("sft", "smollm3", False), ("sft", "smollm3", True), ("sft", "qwen3", False), ("sft", "llama", True),
        ("sft", "windowed", False), ("apo", "smollm3", False), ("apo", "smollm3", True),
    ],
)  # fmt: skip
def test_a_step_is_that_of_keeping_everything(tokenizer, tmp_path, policy, kind, name, bf16):
    model = MODELS[name](tokenizer)
    expected, wanted = first_step(kind, copy.deepcopy(model), "none", tokenizer, tmp_path / "none", bf16)
    loss, gradients = first_step(kind, model, policy, tokenizer, tmp_path / policy, bf16)
    assert loss == expected
    torch.testing.assert_close(gradients, wanted, atol=0, rtol=0)


@pytest.mark.parametrize("policy", RECOMPUTING)
@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_on_a_frozen_model_get_their_gradients(tokenizer, tmp_path, policy, bf16):
    def model():
        return add_adapters(build(tokenizer), dataclasses.replace(ADAPTERS, dropout=0.2), seed=1)

    torch.manual_seed(0)
    expected, wanted = first_step("sft", model(), "none", tokenizer, tmp_path / "none", bf16)
    torch.manual_seed(0)
    loss, gradients = first_step("sft", model(), policy, tokenizer, tmp_path / policy, bf16)
    assert len(gradients) == 4 * 2 * 2 and all(".lora_" in name for name in gradients)
    assert loss == expected
    torch.testing.assert_close(gradients, wanted, atol=0, rtol=0)


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products and attention kernels."""

    def __init__(self):
        super().__init__()
        self.products = self.attention = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.products += operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.attention += "flash_attention_for_cpu" in str(operator) and "backward" not in str(operator)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "again", "attention"), [("none", 0, 0), ("selective", 0, 0), ("full", 6, 1), ("offload", 6, 1)]
)
def test_what_is_computed_a_second_time(tokenizer, policy, again, attention):
    """Of a layer's 7 products the last is never needed again: backward stops recomputing before it."""
    model = build(tokenizer).train()
    apply("s", model, policy)
    hidden = model.model(input_ids=torch.arange(8)[None], use_cache=False).last_hidden_state
    with Counting() as counted:
        hidden.sum().backward()
    assert counted.products == 4 * (2 * 7 + again)
    assert counted.attention == 4 * attention


def test_evaluation_keeps_nothing_and_is_not_recomputed(tokenizer):
    model = build(tokenizer).eval()
    ids = torch.arange(8)[None]
    expected = model(input_ids=ids).logits
    apply("s", model, "selective")
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert len(model(input_ids=ids, use_cache=True).past_key_values) == 4


def test_trls_switch_keeps_the_policy(tokenizer):
    """Its trainers switch recomputation off to generate, and on again by transformers' own function."""
    model = build(tokenizer)
    apply("s", model, "selective")
    functions = [layer._gradient_checkpointing_func for layer in checkpointed_layers(model)]
    assert "context_fn" in functions[0].keywords and model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert [layer._gradient_checkpointing_func for layer in checkpointed_layers(model)] == functions


def test_layers_that_cannot_recompute_are_refused():
    with pytest.raises(UserError, match=r"stages\.s\.activation_checkpointing=full, but Linear has no layers that "):
        apply("s", nn.Linear(2, 2), "full")
    apply("s", nn.Linear(2, 2), "none")
