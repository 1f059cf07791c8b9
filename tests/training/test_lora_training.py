"""LoRA targets are judged before anything is prepared; what was trained is what is merged."""

import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, LlamaConfig

from smolpost.errors import UserError
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.training.adapters import add_adapters, check_targets, frozen_in_bf16, linear_layers, lora_config, merged
from smolpost.training.environment import Environment
from smolpost.training.settings import LoRA
from tests.model.conftest import TINY
from tests.training import tiny_trainers

LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
KEY = "stages.sft.lora.target_modules"


def check(*targets, config=None, **fields):
    config = config or SmolLM3Config(**TINY, **fields)
    check_targets("sft", config, LoRA(r=4, target_modules=list(targets)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], f"{KEY} is empty; name linear layers, or [all-linear]"),
        (["q_proj", "qkv_proj"], f"{KEY} names qkv_proj, which SmolLM3ForCausalLM does not have; its linear layers: "),
        (["proj"], f"{KEY} names proj, which SmolLM3ForCausalLM does not have"),  # the end of a name, as in peft
        (["q_proj", "lm_head"], f"{KEY} names lm_head, the head of SmolLM3ForCausalLM, whose"),
        (
            ["embed_tokens"],
            f"{KEY} names embed_tokens, the embedding of SmolLM3ForCausalLM, whose matrix is its head's",
        ),
        (["model.embed_tokens"], f"{KEY} names model.embed_tokens, the embedding"),
        (["all-linear", "q_proj"], f"{KEY}=['all-linear', 'q_proj']: all-linear means all linear layers; use it"),
        (["mlp"], f"{KEY}=['mlp']: peft refuses it (Target module SmolLM3MLP("),
    ],
)
def test_targets_that_could_not_be_trained_or_merged_are_refused(targets, message):
    with pytest.raises(UserError) as caught:
        check(*targets)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    if targets and targets[0] != "mlp" and "all-linear" not in targets:
        assert str(caught.value).endswith(", ".join(LAYERS))


def test_targets_that_peft_knows_are_taken():
    check(*LAYERS)
    check("all-linear")
    check("self_attn.q_proj", "layers.3.mlp.down_proj")  # part of a path
    check("embed_tokens", tie_word_embeddings=False)
    with pytest.raises(UserError, match="the head of"):
        check("lm_head", tie_word_embeddings=False)
    check("c_attn", config=GPT2Config(n_embd=8, n_layer=1, n_head=2))  # a Conv1D
    check("all-linear", config=LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))


def test_all_linear_is_every_linear_layer_but_the_head():
    model = SmolLM3ForCausalLM(SmolLM3Config(**TINY))
    adapted = {
        name.split(".")[-1]
        for name, module in add_adapters(model, LoRA(r=2, target_modules=["all-linear"]), 0).named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapted == set(LAYERS) == set(linear_layers(SmolLM3ForCausalLM(SmolLM3Config(**TINY))))


@pytest.mark.parametrize("targets", [["q_proj"], ["all-linear"], ["embed_tokens", "down_proj"]])
def test_the_merged_model_is_the_trained_one(targets):
    torch.manual_seed(0)
    base = SmolLM3ForCausalLM(SmolLM3Config(**TINY, tie_word_embeddings=False))
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trained = get_peft_model(base, lora_config(LoRA(r=2, target_modules=targets)))
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    again = SmolLM3ForCausalLM(SmolLM3Config(**TINY, tie_word_embeddings=False))
    again.load_state_dict(start)
    found = merged(again, trained, dict(trained.state_dict()), "adapters")
    tokens = torch.arange(60)[None]
    torch.testing.assert_close(found.eval()(tokens).logits, trained.eval()(tokens).logits, rtol=1e-5, atol=1e-5)
    assert (found.eval()(tokens).logits - again.eval()(tokens).logits).abs().max() == 0  # in place
    moved = [name for name, tensor in found.state_dict().items() if not torch.equal(tensor, start[name])]
    assert {name.split(".")[-2] for name in moved} == set(LAYERS if targets == ["all-linear"] else targets)


def test_adapters_that_got_lost_on_the_way_are_noticed():
    base = SmolLM3ForCausalLM(SmolLM3Config(**TINY))
    trained = get_peft_model(base, lora_config(LoRA(r=2, target_modules=["q_proj"])))
    state = {name: tensor for name, tensor in trained.state_dict().items() if "layers.2" not in name}
    with pytest.raises(UserError, match=r"adapters lacks tensor .*layers\.2\.self_attn\.q_proj\.lora_A"):
        merged(SmolLM3ForCausalLM(SmolLM3Config(**TINY)), trained, state, "adapters")


def test_frozen_matrices_in_bf16_give_the_same_step_in_half_the_memory():
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(SmolLM3Config(**TINY))
    model = add_adapters(model, LoRA(r=4, target_modules=["q_proj", "down_proj"]), seed=0)
    ids = torch.randint(3, 60, (1, 40))

    def step():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]

    def nbytes(kind):
        return sum(p.nbytes for name, p in model.named_parameters() if ("_proj" in name and "lora" not in name) == kind)

    loss, gradients = step()
    matrices, others = nbytes(True), nbytes(False)
    frozen_in_bf16(model)
    assert (nbytes(True), nbytes(False)) == (matrices // 2, others)
    found, same = step()
    torch.testing.assert_close(found, loss, atol=1e-6, rtol=0)
    for x, y in zip(same, gradients, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_our_engine_keeps_frozen_matrices_in_bf16_where_it_computes_in_bf16(bf16, monkeypatch, tmp_path):
    environment = Environment(rank=0, world_size=1, local_world_size=1, use_cpu=True, bf16=bf16)
    monkeypatch.setattr(tiny_trainers, "CPU", environment)
    tokenizer = tiny_trainers.char_tokenizer()
    lora = LoRA(r=4, target_modules=["all-linear"])
    model = add_adapters(tiny_trainers.build(tokenizer), lora, seed=0)
    trainer, *_ = tiny_trainers.sft_trainer(tokenizer, tmp_path, model, max_steps=3)
    trainer.train()
    ids = torch.randint(5, 60, (1, 30))
    written = merged(tiny_trainers.build(tokenizer), model, model.state_dict(), "lora")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        trained, written = (m(input_ids=ids, use_cache=False).logits.float() for m in (trainer.model, written))
    torch.testing.assert_close(written, trained, atol=0.02 if bf16 else 1e-5, rtol=0)
    weights = dict(model.named_parameters())
    half = {name for name, weight in weights.items() if weight.dtype == torch.bfloat16}
    assert half == {name for name in weights if bf16 and ".base_layer." in name}
