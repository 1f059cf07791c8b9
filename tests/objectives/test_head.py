"""Heads as they are read from models, against the models' own logits."""

import pytest
import torch
from head_problems import CLOSE, MODELS, SMALL, build, full_logits
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from smolpost.objectives.head import head_of
from smolpost.objectives.logprobs import token_scores


@pytest.mark.parametrize("name", MODELS)
def test_head_reproduces_the_models_own_logits(name):
    model = build(name)
    ids = torch.randint(3, 40, (1, 12))
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0]
        logits = model(ids).logits[0].float()
    head = head_of(model)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias is not None) == (name == "bias")
    assert_close(full_logits(hidden, head), logits)
    expected = logits.log_softmax(-1)[torch.arange(12), ids[0]]
    assert_close(token_scores(hidden, ids[0], head).logps, expected, **CLOSE)


def test_looking_the_head_up_leaves_no_trace():
    model = build("ours")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.forward = None  # a patched forward, as the trainers', is not asked
    state = torch.get_rng_state()
    head_of(model)
    assert torch.get_rng_state().equal(state)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_close(dict(model.state_dict()), before)


def test_lora_trains_through_a_frozen_head():
    model = get_peft_model(build("ours"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.randint(3, 40, (1, 12))
    hidden = model.get_base_model().base_model(ids).last_hidden_state[0, :-1]
    expected = model(ids, labels=ids).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, trained)
    weights = torch.full((11,), -1 / 11)
    total = token_scores(hidden, ids[0, 1:], head_of(model), weights=weights).total
    assert_close(total, expected)
    assert_close(torch.autograd.grad(total, trained), wanted, atol=1e-6, rtol=1e-4)


def test_a_head_trained_beside_lora_is_the_copy_that_trains():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(build("ours untied"), config)
    wrapper = model.get_base_model().lm_head
    head = head_of(model)
    assert head.weight is wrapper.modules_to_save["default"].weight and head.weight.requires_grad
    with model.disable_adapter():  # how TRL asks a policy for its reference
        assert head_of(model).weight is wrapper.original_module.weight


class ExtraBias(LlamaForCausalLM):
    """A model that does to its logits what no configuration names."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.01
        return output


def adapted_head():
    return get_peft_model(build("ours untied"), LoraConfig(target_modules=["q_proj", "lm_head"]))


def patched_head():
    model = build("llama")
    model.lm_head.forward = lambda hidden: hidden
    return model


def headless():
    return build("llama").model


def on_meta():
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SMALL))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ExtraBias(LlamaConfig(**SMALL)), "ExtraBias does more to its logits than a linear layer"),
        (lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SMALL)), "RecurrentGemmaForCausalLM does more"),
        (
            lambda: BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)),
            "BertLMHeadModel does not hold its output embedding",
        ),
        (adapted_head, r"SmolLM3ForCausalLM is peft.tuners.lora.layer.Linear with a forward of its own"),
        (patched_head, "LlamaForCausalLM is torch.nn.modules.linear.Linear with a forward of its own"),
        (headless, "LlamaModel has no output embedding"),
        (on_meta, "LlamaForCausalLM has a Parameter on meta for a weight"),
    ],
)
def test_heads_that_are_more_than_their_weight_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        head_of(make())
