"""The formula of a step's memory against what a step takes, and what `auto` makes of it."""

import dataclasses
import gc
import types

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import Qwen3Config

from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.schema import Architecture
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from smolpost.training import activations
from smolpost.training.activations import apply, policy_of
from smolpost.training.adapters import add_adapters
from smolpost.training.memory import Setup, memory, setup_of, shape_of, shown
from smolpost.training.scoring import Scored, score_tokens
from smolpost.training.settings import POLICIES, LoRA
from smolpost.training.state import MOMENTS
from tests.training.tiny_trainers import CPU, settings

SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip
SMOLLM3_3B = dataclasses.asdict(Architecture()) | {"model_type": "smollm3", "vocab_size": 128256}
FULL = LoRA()


def gigabytes(setup, config=SMOLLM3_3B):
    found = memory(shape_of(config, compiled=True), setup)
    return {policy: round(peak / 1e9, 1) for policy, peak in found.peak.items()}, found


def test_smollm3_3b_by_hand():
    """One H200 took 60.5 GB for 16,384 tokens with an AdamW that needs 8 GB more than the fused one."""
    shape = shape_of(SMOLLM3_3B, compiled=True)
    assert shape.parameters == 3_075_098_624
    peak, found = gigabytes(Setup(16384, passes=1, bf16=True, lora=FULL))
    assert (found.weights, found.gradients, found.optimizer) == tuple(n * shape.parameters for n in (4, 4, 8))
    assert 51 < peak["full"] < 53
    layer = found.activations["full"] - found.activations["offload"]
    assert layer == (36 - 6) * 16384 * 4 * 2048
    assert found.fastest(0.92 * 80e9) == "full" and found.fastest(0.92 * 141e9) == "none"


@pytest.mark.parametrize(
    ("backend", "ranks", "expected"),
    [
        ("single", 1, (4, 4, 8)), ("ddp", 8, (4, 8, 8)), ("zero1", 8, (2, 2, 1.5)), ("zero2", 8, (2, 0.25, 1.5)),
        ("zero3", 8, (0.25, 0.25, 1.5)), ("fsdp2", 8, (0.5, 0.5, 1)),
    ],
)  # fmt: skip
def test_bytes_of_each_parameter(backend, ranks, expected):
    _, found = gigabytes(Setup(4096, 2, True, FULL, backend, ranks))
    states = found.weights, found.gradients, found.optimizer
    assert states == pytest.approx([n * 3_075_098_624 for n in expected])


def test_parameters_are_the_models():
    for tied in (True, False):
        config = SmolLM3Config(**SIZES, tie_word_embeddings=tied, pad_token_id=0)
        model = SmolLM3ForCausalLM(config)
        shape = shape_of(config.to_dict(), compiled=False)
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        adapted = add_adapters(model, LoRA(r=4), seed=0)
        found = memory(shape, Setup(8, 1, False, LoRA(r=4), device="cpu"))
        assert found.gradients == 4 * sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def live_bytes(model, tokens: int, bf16: bool) -> int:
    """What a decoder's forward pass leaves behind for the backward pass, in bytes."""
    ids = torch.arange(tokens)[None] % 300

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(input_ids=ids, document_lengths=[tokens], use_cache=False).last_hidden_state

    forward()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = forward()
    events = profile.profiler.kineto_results.events()
    del kept
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lora", [FULL, LoRA(r=4)], ids=["all weights", "adapters"])
def test_activations_are_what_a_forward_pass_keeps(policy, bf16, lora):
    config = SmolLM3Config(**SIZES, pad_token_id=0)
    config._attn_implementation = "packed"
    causal = SmolLM3ForCausalLM(config)
    model = add_adapters(causal, lora, seed=0) if lora.r else causal
    apply("s", model.train(), policy)
    found = [live_bytes(causal.model, n, bf16) for n in (256, 512)]
    expected = [
        memory(shape_of(config.to_dict(), compiled=False), Setup(n, 1, bf16, lora, device="cpu")).activations[policy]
        for n in (256, 512)
    ]
    assert found[1] - found[0] == pytest.approx(expected[1] - expected[0], rel=0.1)


# ---------------------------------------------------------------- auto


def test_what_a_stage_asks_for():
    sft = SFTStage(**settings(max_seq_len=4096, micro_batch_size=2, global_batch_size=64))
    assert setup_of(sft, bf16=True, backend="ddp", ranks=8) == Setup(8192, 4, True, sft.lora, "ddp", 8)
    apo = APOStage(**settings(max_seq_len=4096, pack_tokens=6000))
    assert setup_of(apo, bf16=False, backend="single", ranks=1).tokens == 6000
    assert setup_of(APOStage(**settings(engine="trl")), bf16=True, backend="single", ranks=1) is None


@pytest.mark.parametrize(
    ("tokens", "card", "policy"),
    [(16384, 141e9, "none"), (16384, 100e9, "selective"), (16384, 80e9, "full"), (65536, 73e9, "offload")],
)
def test_auto_is_the_fastest_that_fits(tokens, card, policy):
    _, found = gigabytes(Setup(tokens, 1, True, FULL))
    assert found.fastest(0.92 * card) == policy
    assert list(found.peak.values()) == sorted(found.peak.values(), reverse=True)


def test_auto_on_a_cpu_says_why(monkeypatch, capsys):
    """It keeps everything where that takes at most half of the free memory."""
    config = SmolLM3Config(**SIZES, pad_token_id=0)
    model, stage = SmolLM3ForCausalLM(config), SFTStage(**settings(activation_checkpointing="auto"))
    assert policy_of("sft", stage, model, CPU) == "none"
    line = capsys.readouterr().out
    assert line.startswith("stages.sft.activation_checkpointing=auto takes none: ") and line.count("\n") == 1
    monkeypatch.setattr(activations.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10_000_000))
    assert policy_of("sft", dataclasses.replace(stage, max_seq_len=40_000), model, CPU) == "full"
    assert policy_of("sft", dataclasses.replace(stage, engine="trl"), model, CPU) == "full"
    assert policy_of("sft", dataclasses.replace(stage, activation_checkpointing="offload"), model, CPU) == "offload"


def test_models_of_another_kind_have_no_estimate():
    assert shape_of({"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "vocab_size": 9}, compiled=True) is None
    assert shape_of(SMOLLM3_3B | {"num_local_experts": 8}, compiled=True) is None
    assert shape_of({}, compiled=True) is None
    qwen = shape_of(Qwen3Config(**SIZES, head_dim=32).to_dict(), compiled=True)
    assert (qwen.head_size, qwen.fused) == (32, False)


def test_a_plans_lines():
    setup = Setup(16384, 1, True, FULL)
    _, found = gigabytes(setup)
    states, peak = shown(found, setup)
    assert states.startswith("memory of a GPU: weights 12.3 + gradients 12.3 + AdamW 24.6 GB; activations of 16,384 ")
    assert peak.endswith("GB; activation_checkpointing=auto takes full on 80 GB, none on 141 GB")
    small = Setup(256, 1, True, FULL)
    assert len(shown(gigabytes(small, SIZES)[1], small)) == 1


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_the_peak_of_a_step_is_the_formulas(policy):
    """Counted by torch's own tracker of tensors, over a complete optimizer step on the CPU in bf16."""
    tokens = 1024
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = SmolLM3Config(**sizes, num_key_value_heads=2, vocab_size=4096, pad_token_id=0, tie_word_embeddings=True)
    config._attn_implementation = "packed"
    model = SmolLM3ForCausalLM(config).train()
    apply("s", model, policy)
    score_tokens(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():  # as after a first step
        optimizer.state[p] = {"step": torch.zeros(())} | {name: torch.zeros_like(p) for name in MOMENTS}
    ids = torch.arange(tokens)[None]
    scored = Scored(torch.arange(tokens), ids[0], torch.full((tokens,), 1e-4))
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as the trainer has it
            total = model(input_ids=ids, document_lengths=[tokens], scored=scored).total
        (-total).backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    found = memory(shape_of(config.to_dict(), compiled=False), Setup(tokens, 1, True, FULL, device="cpu"))
    assert found.peak[policy] == pytest.approx(peak, rel=0.1)
