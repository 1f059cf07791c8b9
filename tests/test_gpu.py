"""What only a GPU can show: its kernels give what the CPU gives, to the precision of bf16."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from transformers import TrainerCallback
from transformers.models.smollm3 import SmolLM3ForCausalLM as StockSmolLM3

from smolpost.inference import generation
from smolpost.inference.decoding import fits
from smolpost.inference.sampling import Sampling
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM, fused
from smolpost.model.attention_kernels import CPUFlash, attend, kernel_name, segment_attention, varlen_attention
from smolpost.model.attention_segments import find_segments
from smolpost.model.varlen_kernels import VarlenKernel, choose, report
from smolpost.objectives.head import Head
from smolpost.objectives.logprobs import token_scores
from smolpost.training import activations
from smolpost.training.environment import Environment
from smolpost.training.host_memory import HostCopies
from smolpost.training.memory import Setup, memory, shape_of
from smolpost.training.scoring import Scored, score_tokens
from smolpost.training.settings import LoRA
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
    kernel = choose(row[0].cuda(), row[2].cuda(), window, 0.0)
    assert isinstance(kernel, VarlenKernel)

    def results(function, device, dtype):
        inputs = [x.to(device, dtype, copy=True).requires_grad_() for x in row]
        output = function(*inputs, segments, None, window)
        output.float().square().sum().backward()
        return output.detach(), *(x.grad for x in inputs)

    exact = results(CPUFlash.apply, "cpu", torch.float32)
    for function, dtype, tolerance in [
        (partial(varlen_attention, kernel), torch.bfloat16, 0.02),
        (segment_attention, torch.bfloat16, 0.02),
        (segment_attention, torch.float32, 2e-3),
    ]:
        for found, expected in zip(results(function, "cuda", dtype), exact, strict=True):
            close(found, expected, tolerance)


def small_model(window=None):
    torch.manual_seed(0)
    config = SmolLM3Config(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, no_rope_layer_interval=2,
        use_sliding_window=window is not None, sliding_window=window,
    )  # fmt: skip
    config._attn_implementation = "packed"
    return SmolLM3ForCausalLM(config)


def document_step(model, lengths):
    """Logits and gradients of one row of documents on the GPU."""
    ids = torch.randint(3, 500, (1, sum(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model.zero_grad()
    logits = model(
        input_ids=ids.cuda(), position_ids=positions.cuda(), use_cache=False, document_lengths=lengths
    ).logits
    logits.float().square().mean().backward()
    return logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 2e-5), (True, 0.05)])
def test_compiled_functions_equal_eager_ones(monkeypatch, bf16, tolerance):
    model, results = small_model().cuda(), []
    assert not torch.backends.cuda.matmul.allow_tf32
    for switch in ("0", "1"):
        monkeypatch.setenv("SMOLPOST_COMPILE", switch)
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            results.append(document_step(model, [300, 5, 129, 78]))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        close(found, expected, tolerance)


@pytest.mark.parametrize("bf16", [False, True])
def test_training_compiles_each_function_once(monkeypatch, bf16):
    """On a GPU without being asked, for ten packings."""
    monkeypatch.delenv("SMOLPOST_COMPILE", raising=False)
    assert fused._compiler_works("cuda")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_model().cuda()
    for n in (256, *range(300, 400, 10)):
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            document_step(model, [n // 3, n - n // 3])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def test_the_kernel_is_named_and_its_absence_reported():
    segments = find_segments(512, document_lengths=[300, 212])
    row = [torch.randn(1, n, 512, 64, device="cuda") for n in (4, 2, 2)]
    attend(*(x.bfloat16() for x in row), segments, None, None, 0.0)
    assert kernel_name() in ("flash-attention-3", "torch-varlen", "flash-attention-2")
    report.cache_clear()
    with pytest.warns(UserWarning, match="document by document, which is slower: .* set precision=bf16"):
        attend(*row, segments, None, None, 0.0)
    assert kernel_name() == "sdpa"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
@pytest.mark.parametrize("window", [None, 50])
def test_a_models_gradients_equal_the_cpus(layout, window):
    on_cpu, on_gpu = small_model(window), small_model(window).cuda()
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


def decoding_model(family):
    torch.manual_seed(0)
    config = SmolLM3Config(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    config._attn_implementation = "packed" if family is SmolLM3ForCausalLM else "sdpa"
    return family(config).cuda()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", [SmolLM3ForCausalLM, StockSmolLM3])
def test_graphs_give_the_tokens_of_steps_and_of_generate(monkeypatch, capsys, family, temperature):
    """In fp32, so that rounding decides between no two tokens; 400 tokens take two windows."""
    model = decoding_model(family)
    prompts = [[3 + (7 * i + j) % 400 for j in range(n)] for i, n in enumerate([40, 3, 17, 40, 1, 90, 8, 8])]
    replies = partial(
        generation.generate, model, prompts, max_new_tokens=400, temperature=temperature, top_p=0.9, seed=3,
        eos_token_ids=[2], pad_token_id=0, batch_size=3,
    )  # fmt: skip
    assert fits(model, 3, 490)
    captured = []

    def counted(capture):
        return lambda step: captured.append(step.args) or capture(step)

    with monkeypatch.context() as patch:
        graphs = generation.cuda_graphs
        patch.setattr(generation, "cuda_graphs", lambda: counted(graphs()))
        by_graphs = replies()
    assert captured and "without CUDA graphs" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(generation, "cuda_graphs", lambda: None)
        assert replies() == by_graphs
    monkeypatch.setattr(generation, "fits", lambda *_: False)
    assert replies() == by_graphs


def test_replies_with_seeds_of_their_own_are_the_same_alone_and_by_generate(monkeypatch):
    model = decoding_model(SmolLM3ForCausalLM)
    prompts = [[3 + (7 * i + j) % 400 for j in range(n)] for i, n in enumerate([40, 3, 17, 90, 8])]
    sampling = Sampling(0.8, top_p=0.95, top_k=20)

    def replies(rows):
        return generation.generate_each(
            model, [prompts[i] for i in rows], [1000 + i for i in rows], sampling, max_new_tokens=300,
            eos_token_ids=[2], pad_token_id=0,
        )  # fmt: skip

    assert fits(model, 5, 390)
    together = replies(range(5))
    assert [replies([i])[0] for i in range(5)] == together
    monkeypatch.setattr(generation, "fits", lambda *_: False)
    assert replies(range(5)) == together


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


def test_copies_to_the_host_are_of_the_moment_at_which_they_were_asked_for():
    """The device overwrites the tensors before anything waits for it."""
    tensors = [torch.full((n, 1000), float(n), device="cuda") for n in (3000, 1, 20000, 500)]
    copy = HostCopies(sum(tensor.numel() for tensor in tensors))
    copies = [copy(tensor) for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    torch.cuda.synchronize()
    assert all(copied.is_pinned() and torch.equal(copied, torch.full_like(copied, len(copied))) for copied in copies)


def test_a_resumed_training_ends_as_the_uninterrupted(tmp_path, monkeypatch):
    """With the fused optimizer, from a checkpoint written beside later steps. Some kernels add in any order."""
    monkeypatch.setattr(tiny_trainers, "CPU", dataclasses.replace(tiny_trainers.CPU, use_cpu=False))
    tokenizer = tiny_trainers.char_tokenizer()
    model = tiny_trainers.build(tokenizer)
    words = {"max_steps": 8, "save_steps": 3, "max_seq_len": 420}
    whole, rows, stage = tiny_trainers.sft_trainer(tokenizer, tmp_path, copy.deepcopy(model), **words)
    whole.train()
    again = tiny_trainers.trainer_of(stage, rows, tokenizer, tmp_path, copy.deepcopy(model))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert whole.writer.copies and whole.optimizer.optimizer.defaults["fused"]
    for name, tensor in whole.model.state_dict().items():
        assert tensor.is_cuda
        torch.testing.assert_close(again.model.state_dict()[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", ["none", "selective", "full", "offload"])
def test_peak_memory_is_the_formulas(policy):
    """Of a step with one forward pass."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8}
    config = SmolLM3Config(**sizes, num_key_value_heads=2, vocab_size=4096, pad_token_id=0)
    config._attn_implementation = "packed"
    tokens = 16384
    with torch.device("cuda"):
        model = SmolLM3ForCausalLM(config).train()
    activations.apply("s", model, policy)
    score_tokens(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.arange(tokens, device="cuda")[None] % 4000
    scored = Scored(torch.arange(tokens, device="cuda"), ids[0], torch.full((tokens,), 1e-4, device="cuda"))
    for _ in range(2):  # AdamW's moments come with the first step
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            total = model(input_ids=ids, document_lengths=[tokens], scored=scored).total
        (-total).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = memory(shape_of(config.to_dict(), compiled=True), Setup(tokens, 1, True, LoRA()))
    assert torch.cuda.max_memory_allocated() == pytest.approx(found.peak[policy], rel=0.1)


@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
def test_a_policys_gradients_are_those_of_keeping_everything(policy):
    config = SmolLM3Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "packed"
    ids, gradients = torch.arange(1024, device="cuda")[None] % 500, []
    for chosen in ("none", policy):
        torch.manual_seed(0)
        model = SmolLM3ForCausalLM(config).cuda().train()
        activations.apply("s", model, chosen)
        for _ in range(2):  # offloading starts each pass with an empty list
            with torch.autocast("cuda", torch.bfloat16):
                hidden = model.model(input_ids=ids, document_lengths=[624, 400]).last_hidden_state
            hidden.float().square().sum().backward()
        gradients.append([p.grad for p in model.model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        close(found, expected, 1e-2)
