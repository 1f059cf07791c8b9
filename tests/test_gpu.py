"""What only a GPU can show: its kernels give what the CPU gives, to the precision of bf16."""

import pytest
import torch
from transformers import TrainerCallback

from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.model.attention_kernels import CPUFlash, segment_attention, varlen_attention, varlen_fits
from smolpost.model.attention_segments import find_segments
from smolpost.objectives.head import Head
from smolpost.objectives.logprobs import token_scores
from smolpost.training.environment import Environment
from tests.training import tiny_trainers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LAYOUTS = [{"document_lengths": [300, 5, 129, 78]}, {"pair_lengths": [(200, 40, 70), (0, 30, 20), (90, 1, 61)]}]
# Shorter than most segments; of a tile of kernels and one more; over some segments; over all.
WINDOWS = [None, 2, 17, 64, 65, 128, 400]


def close(found, expected, tolerance):
    """To a share of the expected tensor's size, as rounding errors go with it."""
    expected = expected.to(found.device, torch.float32)
    assert (found.float() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", WINDOWS)
def test_attention_equals_the_cpus(layout, heads, window):
    """FlashAttention in bf16 and SDPA in bf16 and fp32, outputs and gradients, against fp32 on the CPU."""
    segments = find_segments(512, **layout)
    torch.manual_seed(0)
    row = [torch.randn(1, n, 512, 64).bfloat16() for n in (heads[0], heads[1], heads[1])]
    assert varlen_fits(row[0].cuda())

    def results(attend, device, dtype):
        inputs = [x.to(device, dtype, copy=True).requires_grad_() for x in row]
        output = attend(*inputs, segments, None, window)
        output.float().square().sum().backward()
        return output.detach(), *(x.grad for x in inputs)

    exact = results(CPUFlash.apply, "cpu", torch.float32)
    for attend, dtype, tolerance in [
        (varlen_attention, torch.bfloat16, 0.02),
        (segment_attention, torch.bfloat16, 0.02),
        (segment_attention, torch.float32, 2e-3),
    ]:
        for found, expected in zip(results(attend, "cuda", dtype), exact, strict=True):
            close(found, expected, tolerance)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
@pytest.mark.parametrize("window", [None, 50])
def test_a_models_gradients_equal_the_cpus(layout, window):
    torch.manual_seed(0)
    config = SmolLM3Config(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, no_rope_layer_interval=2,
        use_sliding_window=window is not None, sliding_window=window,
    )  # fmt: skip
    config._attn_implementation = "packed"
    on_cpu = SmolLM3ForCausalLM(config)
    on_gpu = SmolLM3ForCausalLM(config).cuda()
    on_gpu.load_state_dict(on_cpu.state_dict())
    ids = torch.randint(3, 500, (1, 512))
    lengths = layout.get("document_lengths")
    if lengths:
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
    else:
        spans = [(0, p + c, p, p + r) for p, c, r in layout["pair_lengths"]]
        positions = torch.cat([torch.arange(a, b) for span in spans for a, b in (span[:2], span[2:])])[None]
    for model, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            inputs = {"input_ids": ids.to(device), "position_ids": positions.to(device)}
            logits = model(**inputs, use_cache=False, **layout).logits
        logits.float().square().mean().backward()
    for found, expected in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        close(found.grad, expected.grad, 0.05)


@pytest.mark.parametrize("weighted", [True, False])
def test_token_scores_equal_the_cpus(weighted):
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64), torch.randn(5000, 64) / 8
    targets, weights = torch.randint(0, 5000, (300,)), torch.rand(300)
    results = []
    for device in ("cpu", "cuda"):
        h, w = (x.detach().clone().to(device).requires_grad_() for x in (hidden, weight))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            coefficients = weights.to(device)
            given = coefficients if weighted else None
            scores = token_scores(h, targets.to(device), Head(w, None, None, 1.0), weights=given)
        (scores.total if weighted else (coefficients * scores.logps).sum()).backward()
        results.append((scores.logps.detach(), scores.entropy, h.grad, w.grad))
    for expected, found in zip(*results, strict=True):
        close(found, expected, 0.02)


class WaitingIsAnError(TrainerCallback):
    """From the second step on, which no longer sets anything up."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["sft", "apo"])
def test_an_optimizer_step_never_waits(name, tmp_path, monkeypatch):
    gpu = Environment(rank=0, world_size=1, local_world_size=1, use_cpu=False, bf16=True)
    monkeypatch.setattr(tiny_trainers, "CPU", gpu)
    tokenizer, few = tiny_trainers.char_tokenizer(), {"max_steps": 4, "logging_steps": 100}
    model = tiny_trainers.build(tokenizer)
    if name == "sft":
        run, *_ = tiny_trainers.sft_trainer(tokenizer, tmp_path, model, **few)
    else:
        few |= {"pack_tokens": 150, "sft_weight": 0.5, "ld_alpha": 0.5}
        run, *_ = tiny_trainers.pair_trainer(tokenizer, tmp_path, model, tiny_trainers.build(tokenizer), **few)
    run.add_callback(WaitingIsAnError())
    try:
        run.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.state.global_step == 4
