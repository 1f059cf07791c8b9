"""The weighted mean against fp64 and exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolpost.merging.average import Mean, is_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def means(chunks, weights, dtype):
    return Mean(weights, dtype, chunks[0].numel())(chunks)


@st.composite
def inputs(draw):
    """Chunks of one dtype with values of many magnitudes, positive weights that sum to about 1, an output dtype."""
    number, size = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = 10.0 ** draw(st.integers(-3, 2))
    chunks = [(scale * torch.randn(size, generator=seeded)).to(draw(st.sampled_from(DTYPES))) for _ in range(number)]
    parts = [draw(st.integers(1, 20)) for _ in range(number)]
    return chunks, [part / sum(parts) for part in parts], draw(st.sampled_from(DTYPES))


@settings(max_examples=200, deadline=None)
@given(inputs())
def test_mean_is_the_fp64_mean_up_to_the_roundings_that_are_stated(case):
    chunks, weights, dtype = case
    terms = [chunk.double() * weight for chunk, weight in zip(chunks, weights, strict=True)]
    exact = sum(terms)
    found = means(chunks, weights, dtype)
    assert found.dtype == dtype
    fp32, written = torch.finfo(torch.float32), torch.finfo(dtype)
    sums = (len(chunks) + 1) * fp32.eps * sum(term.abs() for term in terms)
    once = written.eps / 2 * exact.abs() + written.tiny * written.eps
    assert ((found.double() - exact).abs() <= once + sums).all()


@settings(max_examples=100, deadline=None)
@given(inputs())
def test_result_is_the_fp32_mean_rounded_once(case):
    chunks, weights, dtype = case
    assert torch.equal(means(chunks, weights, dtype), means(chunks, weights, torch.float32).to(dtype))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**7), 2**7), min_size=2, max_size=4), st.sampled_from(DTYPES))
def test_exact_sums_are_exact(values, dtype):
    # Small integers times powers of two: no product or sum is rounded, so only the last step may be.
    weights = [2.0**-i for i in range(1, len(values))] + [2.0 ** -(len(values) - 1)]
    exact = sum(Fraction(value) * Fraction(weight) for value, weight in zip(values, weights, strict=True))
    chunks = [torch.tensor([float(value)]) for value in values]
    assert means(chunks, weights, dtype) == torch.tensor([float(exact)], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.5), (torch.bfloat16, 0.999), (torch.float16, 0.99)])
def test_share_of_correctly_rounded_elements(dtype, least):
    """In float32 the sums' own roundings show, at most a few units; a shorter output hides them but for near ties."""
    torch.manual_seed(0)
    chunks = [torch.randn(100_000) for _ in range(3)]
    weights = (0.45, 0.45, 0.1)
    exact = sum(weight * chunk.double() for weight, chunk in zip(weights, chunks, strict=True))
    share = (means(chunks, weights, dtype) == exact.to(dtype)).float().mean().item()
    assert share > least


def test_weights_are_taken_as_given():
    assert means([torch.tensor([3.0]), torch.tensor([1.0])], [2.0, -0.5], torch.float32) == 5.5


def test_buffers_are_reused_and_shorter_chunks_fit():
    mean = Mean([1.0], torch.bfloat16, 4)
    first = mean([torch.ones(4)])
    assert torch.equal(mean([torch.full((2,), 2.0)]), torch.full((2,), 2.0, dtype=torch.bfloat16))
    assert first[:2].tolist() == [2, 2]


def test_refuses_chunks_that_do_not_match():
    with pytest.raises(ValueError, match=r"2 weights need as many chunks of one length, not \[\(2,\), \(1,\)\]"):
        means([torch.ones(2), torch.ones(1)], [0.5, 0.5], torch.float32)
    with pytest.raises(ValueError, match=r"1 weights need as many chunks of one length, not \[\(2,\), \(2,\)\]"):
        means([torch.ones(2), torch.ones(2)], [0.5], torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_is_seen_wherever_it_stands(value, dtype):
    for place in range(5):
        values = torch.ones(5, dtype=dtype)
        assert is_finite(values)
        values[place] = value
        assert not is_finite(values)
