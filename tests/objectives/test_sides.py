"""Log-probabilities of sides: hand values, and LD-DPO's weights by their definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from smolpost.objectives.sides import summed_logps

anywhere = settings(deadline=None)  # a busy CPU is no failure


def test_refusals():
    with pytest.raises(ValueError, match=r"ld_alpha=1.5 is outside \[0, 1\]"):
        summed_logps(torch.zeros(2), torch.tensor([0, 1]), 2, ld_alpha=1.5)
    with pytest.raises(ValueError, match="num_sides=3 is odd"):
        summed_logps(torch.zeros(3), torch.tensor([0, 1, 2]), 3)


def test_summed_logps_matches_hand_value():
    logps = torch.tensor([-1.0, -2.0, -4.0, -3.0, -5.0, -6.0], requires_grad=True)
    side = torch.tensor([0, 0, 0, 1, 1, 2])  # 3 and 2 tokens; 1 token and none
    assert summed_logps(logps, side, 4).tolist() == [-7.0, -8.0, -6.0, 0.0]
    sums = summed_logps(logps, side, 4, ld_alpha=0.5)
    assert sums.tolist() == [-5.0, -8.0, -3.0, 0.0]  # -4 of the third chosen token and -6 (its rival is empty) by half
    sums.sum().backward()
    assert logps.grad.tolist() == [1.0, 1.0, 0.5, 1.0, 1.0, 0.5]


def test_long_sides_are_summed_finely():
    """fp32 accumulation, token by token, is off by about a nat here."""
    logps = -2 * torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    total = summed_logps(logps, torch.zeros(len(logps), dtype=torch.int64), 2)[0]
    assert abs(total.item() - logps.double().sum().item()) <= 2**-8  # half of fp32's spacing at 100,000
    assert total.dtype == torch.float32


sides = st.lists(st.tuples(st.integers(0, 5), st.floats(-20, 0, width=32)), max_size=60)


@anywhere
@given(sides)
def test_ld_alpha_one_is_the_plain_sum(tokens):
    logps, side = torch.tensor([t[1] for t in tokens]), torch.tensor([t[0] for t in tokens], dtype=torch.int64)
    assert_close(summed_logps(logps, side, 6, ld_alpha=1.0), summed_logps(logps, side, 6), rtol=0, atol=0)


@anywhere
@given(st.integers(0, 30), st.floats(0, 1), st.randoms())
def test_ld_alpha_has_no_part_in_pairs_of_equal_lengths(length, alpha, random):
    side = torch.tensor([0, 1] * length, dtype=torch.int64)
    logps = torch.tensor([-random.random() for _ in side])
    assert_close(summed_logps(logps, side, 2, ld_alpha=alpha), summed_logps(logps, side, 2), rtol=0, atol=0)


@anywhere
@given(sides, st.floats(0, 1), st.randoms())
def test_ld_alpha_does_not_see_how_sides_are_mixed(tokens, alpha, random):
    """Sides one after another, or interleaved in any way that keeps each side's order: the same sums and gradients."""
    queues = {s: [t[1] for t in tokens if t[0] == s] for s in range(6)}
    mixed = [t[0] for t in tokens]
    random.shuffle(mixed)
    orders = sorted(mixed), mixed
    found = []
    for order in orders:
        left = {s: iter(q) for s, q in queues.items()}
        logps = torch.tensor([next(left[s]) for s in order], dtype=torch.float32, requires_grad=True)
        side = torch.tensor(order, dtype=torch.int64)
        sums = summed_logps(logps, side, 6, ld_alpha=alpha)
        sums.sum().backward()
        found.append((sums, torch.cat([logps.grad[side == s] for s in range(6)])))
    expected = []
    for s in range(6):  # the definition, side by side
        shorter = min(len(queues[s]), len(queues[s ^ 1]))
        expected.append(sum(queues[s][:shorter]) + alpha * sum(queues[s][shorter:]))
    for sums, grad in found:
        assert_close(sums, torch.tensor(expected), atol=1e-4, rtol=1e-6)
        assert_close(grad, found[0][1], rtol=0, atol=0)
