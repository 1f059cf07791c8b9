"""The pure functions of a decoder layer, compiled and not, give the same numbers in every way that layers are run."""

import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from smolpost.model import fused
from smolpost.model.layers_smollm3 import SmolLM3DecoderLayer, SmolLM3RotaryEmbedding
from tests.model.packed_rows import SIZES, SmolLM3Config, build, document_positions, step

LENGTHS = [9, 4, 17]
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


@contextmanager
def compiled(monkeypatch, on=True):
    with monkeypatch.context() as patch:
        patch.setenv("SMOLPOST_COMPILE", "1" if on else "0")
        yield


def both(monkeypatch, results):
    """What a function of no arguments returns, eager and compiled."""
    found = []
    for on in (False, True):
        with compiled(monkeypatch, on):
            found.append(results())
    return found


def assert_near(found, expected, tolerance=1e-5):
    """To a share of each expected tensor's norm."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        off = (found[name].float() - tensor.float()).norm()
        assert off <= tolerance * tensor.float().norm(), (name, off)


def row_step(**changes):
    return step(build("packed", **changes), LENGTHS, document_lengths=LENGTHS)


def test_compiled_functions_equal_eager_ones(monkeypatch):
    """Each by itself, where nothing but its own rounding counts."""

    def results():
        torch.manual_seed(0)
        hidden, update = torch.randn(2, 2, 7, 32)
        heads = [torch.randn(2, 7, n, 8).transpose(1, 2) for n in (4, 2)]
        cases = {
            "rms_norm": [hidden, torch.randn(32), 1e-6, None],
            "add_rms_norm": [hidden, update, torch.randn(32), 1e-6, None],
            "rope": [*heads, *torch.randn(2, 1, 7, 8), None],
            "swiglu": [hidden, update],
        }
        found = {}
        for name, arguments in cases.items():
            learned = [x.clone().requires_grad_() for x in arguments if isinstance(x, torch.Tensor)]
            outputs = getattr(fused, name)(*learned, *arguments[len(learned) :])
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            directions = [torch.randn(x.shape) for x in outputs]
            for i, x in enumerate((*outputs, *torch.autograd.grad(outputs, learned, directions))):
                found[name, i] = x.detach()
        return found

    eager, found = both(monkeypatch, results)
    assert len(found) == 3 + 5 + 6 + 3
    assert_near(found, eager, 1e-6)


def test_compiled_equals_eager_in_a_model(monkeypatch):
    eager, found = both(monkeypatch, row_step)
    assert_near(found, eager)


@pytest.mark.slow
def test_compiled_equals_eager_under_autocast(monkeypatch):
    """To the rounding of bf16: a compiled function rounds its result, an eager one every step to it."""
    with BF16():
        eager, found = both(monkeypatch, row_step)
    assert_near(found, eager, 0.05)


def test_no_packing_is_compiled_twice(monkeypatch):
    """Each of the four functions is one graph, after ten rows of other lengths; one is as long as the hidden size."""
    assert fused._compiler_works("cpu")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build("packed")
    with compiled(monkeypatch):
        for n in (32, *range(40, 130, 10)):
            lengths = [n // 3, n - n // 3]
            step(model, lengths, document_lengths=lengths)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def save_products(ctx, op, *args, **kwargs):
    is_product = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.slow
@pytest.mark.parametrize("selective", [False, True])
def test_compiled_equals_eager_in_a_checkpoint(monkeypatch, selective):
    """Recomputed whole, and where a policy of aten operations says what is kept."""
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, save_products)} if selective else {}

    def checkpointed():
        model = build("packed")
        for layer in model.model.layers:
            inner = layer.forward
            layer.forward = partial(checkpoint, inner, use_reentrant=False, **contexts)
        return step(model, LENGTHS, document_lengths=LENGTHS)

    with compiled(monkeypatch, False):
        expected = row_step()
    eager, found = both(monkeypatch, checkpointed)
    assert_near(eager, expected)
    assert_near(found, expected)


def test_compiled_equals_eager_with_adapters(monkeypatch):
    """Norm weights that do not train are other graphs than those that do."""

    def adapted():
        model = get_peft_model(build("packed"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        found = step(model, LENGTHS, document_lengths=LENGTHS)
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    eager, found = both(monkeypatch, adapted)
    assert_near(found, eager)


@pytest.mark.slow
def test_compiled_equals_eager_under_ddp(monkeypatch, tmp_path):
    """DDP has the compiler cut graphs at the ends of its buckets."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)

    def parallel():
        model = torch.nn.parallel.DistributedDataParallel(build("packed"))
        return step(model, LENGTHS, document_lengths=LENGTHS)

    try:
        eager, found = both(monkeypatch, parallel)
    finally:
        torch.distributed.destroy_process_group()
    assert_near(found, eager)


def test_autocast_is_what_linear_layers_read_anyway(monkeypatch):
    """Norms and RoPE return its dtype, rounded once from fp32; without it, nothing is cast."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 5, 8), torch.randn(8)
    exact = fused.rms_norm(hidden, weight, 1e-6, None)
    assert exact.dtype == torch.float32
    assert torch.equal(fused.rms_norm(hidden, weight, 1e-6, torch.bfloat16), exact.bfloat16())
    total, normed = fused.add_rms_norm(hidden, hidden.bfloat16(), weight, 1e-6, torch.bfloat16)
    assert torch.equal(total, hidden + hidden.bfloat16())
    assert torch.equal(normed, fused.rms_norm(total, weight, 1e-6, torch.bfloat16))
    query, key = torch.randn(1, 4, 5, 8).bfloat16(), torch.randn(1, 2, 5, 8).bfloat16()
    cos, sin = torch.randn(2, 1, 5, 8)
    turned = fused.rope(query.float(), key.float(), cos, sin, None)
    for found, expected in zip(fused.rope(query, key, cos, sin, torch.bfloat16), turned, strict=True):
        assert torch.equal(found, expected.bfloat16())
    assert fused.autocast_dtype(hidden) is None
    with BF16():
        assert fused.autocast_dtype(hidden) == torch.bfloat16


def bytes_per_token(config) -> float:
    """What a layer keeps for its backward pass under autocast; weights and their copies drop out of the difference."""
    torch.manual_seed(0)
    layer, angles = SmolLM3DecoderLayer(config, 0), SmolLM3RotaryEmbedding(config)

    def kept(num_tokens):
        hidden = torch.randn(1, num_tokens, config.hidden_size, requires_grad=True)
        positions = document_positions([num_tokens])
        options = {"position_embeddings": angles(hidden, positions), "attention_mask": None, "position_ids": positions}
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with BF16(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = layer(hidden, document_lengths=[num_tokens], **options)
        output.sum().backward()
        return sum(storage.nbytes() for storage in storages.values())

    return (kept(200) - kept(100)) / 100


@pytest.mark.parametrize("on", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_layer_keeps_no_more_than_it_must(monkeypatch, on):
    config = SmolLM3Config(**SIZES, no_rope_layers=[1] * 4)
    config._attn_implementation = "packed"
    H, N, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    D, wide = H // N, config.intermediate_size
    # Each norm: its input in fp32, its scale, its output in bf16. Attention: cosines and sines, its inputs and output,
    # log-sum-exps. The MLP: gate, up and their product.
    most = 2 * (4 * H + 4 + 2 * H) + 8 * D + 2 * (2 * N + 2 * K) * D + 4 * N + 3 * 2 * wide
    if not on:
        most += 2 * 4 * H + 2 * wide  # what is between two operations: normed in fp32, silu(gate)
    with compiled(monkeypatch, on):
        assert bytes_per_token(config) == most


def test_which_calls_are_compiled(monkeypatch):
    here, nowhere = torch.ones(2), torch.ones(2, device="meta")
    assert not fused._is_compiled(here)  # a CPU that nobody asked for
    with compiled(monkeypatch):
        monkeypatch.setattr(fused, "_compiler_works", lambda device: True)
        assert fused._is_compiled(here) and not fused._is_compiled(nowhere)
        with torch.no_grad():
            assert not fused._is_compiled(here)  # generation
            with BF16():
                assert fused._is_compiled(here)  # a reference's pass
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not fused._is_compiled(here)
    with compiled(monkeypatch, False):
        assert not fused._is_compiled(here)


def test_a_compiler_that_fails_is_reported_once_and_left_out(monkeypatch):
    def broken(function, **options):
        raise RuntimeError("Failed to find C compiler.\nlong trace")

    expected = row_step()
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(fused, "_compiler_works", fused.cache(fused._compiler_works.__wrapped__))
    with compiled(monkeypatch):
        with pytest.warns(UserWarning, match="slower .*: Failed to find C compiler.; install the triton .* or set"):
            found = row_step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not fused._is_compiled(torch.ones(2))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
