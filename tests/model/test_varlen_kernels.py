"""Which FlashAttention a card gets, under every signature that it comes with, and what is said where there is none."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from smolpost.model import attention_kernels as kernels
from smolpost.model import varlen_kernels
from smolpost.model.attention_segments import find_segments
from smolpost.model.varlen_kernels import VarlenKernel
from tests.model.packed_rows import PAIRS, assert_equal, inputs, reference_varlen_attn, run

HOPPER, AMPERE = (9, 0), (8, 0)


def torch_2_10(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    scale = q.shape[-1] ** -0.5
    return reference_varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=(-1, 0))


def torch_2_11(q, k, v, *index, return_aux=None, scale=None, window_size=(-1, -1)):
    return reference_varlen_attn(q, k, v, *index, scale=scale, window_size=window_size)


def torch_2_12(q, k, v, *index, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False):
    return reference_varlen_attn(q, k, v, *index, scale=scale, window_size=window_size, enable_gqa=enable_gqa)


def flash_attn(*args, softmax_scale, causal, window_size):
    assert causal
    return reference_varlen_attn(*args, scale=softmax_scale, window_size=window_size)


def flash_attn_3_beta(*args, **options):
    return flash_attn(*args, **options), "log-sum-exps"


@pytest.fixture
def install(monkeypatch):
    """Return a function that puts a signature of torch's varlen_attn and flash-attn packages in place."""
    monkeypatch.setattr(varlen_kernels, "_fastest", varlen_kernels._fastest.__wrapped__)

    def put(torch_varlen, fa2=None, fa3=None):
        monkeypatch.setattr(varlen_kernels, "varlen_attn", torch_varlen)
        for name, function in (("flash_attn", fa2), ("flash_attn_interface", fa3)):
            module = function and SimpleNamespace(flash_attn_varlen_func=function)
            monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("installed", "capability", "expected"),
    [
        ((torch_2_10,), HOPPER, "torch-varlen"),
        ((torch_2_10, flash_attn), HOPPER, "torch-varlen"),
        ((torch_2_11, flash_attn), AMPERE, "torch-varlen"),
        ((torch_2_12,), HOPPER, "torch-varlen"),
        ((torch_2_12, flash_attn, flash_attn), HOPPER, "flash-attention-3"),
        ((torch_2_12, None, flash_attn_3_beta), HOPPER, "flash-attention-3"),
        ((torch_2_12, None, flash_attn), AMPERE, "torch-varlen"),  # FlashAttention 3 is for Hopper
    ],
)
def test_every_kernel_gives_the_same_attention(install, installed, capability, expected, window, scale):
    install(*installed)
    row = inputs(sum(map(sum, PAIRS)))
    segments = find_segments(row[0].shape[2], pair_lengths=PAIRS)
    kernel = varlen_kernels._fastest(capability, window is not None)
    if window is not None and installed[0] is torch_2_10:  # which takes no windows
        expected = "flash-attention-2" if len(installed) > 1 else None
    assert (kernel and kernel.name) == expected
    if kernel is not None:
        if scale is None:
            scale = row[0].shape[3] ** -0.5
        found = run(lambda *args: kernels.varlen_attention(kernel, *args), row, segments, scale, window)
        assert_equal(found, run(kernels.segment_attention, row, segments, scale, window))


@pytest.mark.parametrize(
    ("size", "value_size", "dtype", "capability", "window", "dropout", "reason"),
    [
        (128, 128, torch.bfloat16, HOPPER, None, 0.0, None),
        (64, 64, torch.float16, AMPERE, None, 0.0, None),
        (128, 128, torch.float32, HOPPER, None, 0.0, "computes in float32; set precision=bf16"),
        (100, 100, torch.bfloat16, HOPPER, None, 0.0, "have 100 and 100"),
        (256, 256, torch.bfloat16, HOPPER, None, 0.0, "have 256 and 256"),
        (128, 64, torch.bfloat16, HOPPER, None, 0.0, "have 128 and 64"),
        (128, 128, torch.bfloat16, (7, 5), None, 0.0, "this card has 7.5"),
        (128, 128, torch.bfloat16, HOPPER, None, 0.1, "set attention_dropout=0.1 to 0"),
        (128, 128, torch.bfloat16, HOPPER, 64, 0.0, "no sliding window, .* one of 64; install torch>=2.11 or flash"),
    ],
)
def test_why_no_kernel_runs(monkeypatch, install, size, value_size, dtype, capability, window, dropout, reason):
    install(torch_2_10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query, value = torch.empty(1, 2, 3, size, dtype=dtype), torch.empty(1, 1, 3, value_size, dtype=dtype)
    found = varlen_kernels.choose(query, value, window, dropout)
    if reason is None:
        assert isinstance(found, VarlenKernel)
        return
    monkeypatch.setattr(varlen_kernels, "report", varlen_kernels.cache(varlen_kernels.report.__wrapped__))
    with pytest.warns(UserWarning, match=f"packed attention runs document by document, .*{reason}"):
        varlen_kernels.report(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        varlen_kernels.report(found)  # once is enough


def test_the_kernel_in_use_has_a_name():
    row = inputs(12)
    segments = find_segments(12, [7, 5])
    kernels.attend(*row, segments, None, None, 0.0)
    assert kernels.kernel_name() == "cpu-flash"
    kernels.attend(*row, segments, None, None, 0.5)
    assert kernels.kernel_name() == "sdpa"
