"""Every row of a global batch is in one forward pass of one rank, however many ranks; all make equally many passes."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolpost.training.batches import GlobalBatches, MicroBatch, by_count, by_tokens

CASES = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 60),
    st.integers(0, 3),
)


def batches(lengths, global_batch_size, ranks=1, rank=0, capacity=50, seed=0):
    lengths = np.array(lengths)
    passes = functools.partial(by_tokens, lengths=lengths, capacity=capacity)
    return GlobalBatches(lengths, global_batch_size, passes, seed=seed, rank=rank, num_ranks=ranks)


def steps_of(case, ranks):
    lengths, global_batch_size, _, capacity, epoch = case
    all_ranks = [batches(lengths, global_batch_size, ranks, rank, capacity) for rank in range(ranks)]
    for one in all_ranks:
        one.set_epoch(epoch)
    return list(zip(*all_ranks, strict=True))


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_any_ranks_share_the_same_global_batches(case):
    """Step for step, the ranks together hold the rows that one process holds, each once."""
    alone, shared = steps_of(case, 1), steps_of(case, case[2])
    assert len(alone) == len(shared) == -(-len(case[0]) // case[1])
    for one, several in zip(alone, shared, strict=True):
        assert len({len(passes) for passes in several}) == 1
        counted = lambda ranks: sorted(row for passes in ranks for p in passes if p.counts for row in p.rows)  # noqa: E731
        assert counted(one) == counted(several)
    seen = [row for step in shared for passes in step for p in passes if p.counts for row in p.rows]
    assert sorted(seen) == list(range(len(case[0])))


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_packs_hold_at_most_the_capacity_or_one_row(case):
    lengths, capacity = case[0], case[3]
    for step in steps_of(case, case[2]):
        for passes in step:
            for p in passes:
                assert sum(lengths[row] for row in p.rows) <= capacity or len(p.rows) == 1


def test_passes_are_halved_before_ranks_run_empty():
    one = batches([10] * 8, 8, ranks=4, capacity=80)
    dealt = one.deal(list(range(8)))
    assert [[len(p.rows) for p in passes] for passes in dealt] == [[2]] * 4 and one.idle_share() == 0
    thin = batches([10, 10, 9], 3, ranks=4)
    assert [passes[0].counts for passes in thin.deal([0, 1, 2])] == [True] * 3 + [False]
    assert thin.deal([0, 1, 2])[3] == [MicroBatch([2], counts=False)] and thin.idle_share() == 0.25


def test_ranks_run_passes_of_similar_length_together():
    dealt = batches([50, 1, 40, 49, 2, 39], 6, ranks=2, capacity=50, seed=None).deal(list(range(6)))
    tokens = [[sum((50, 1, 40, 49, 2, 39)[r] for r in p.rows) for p in passes] for passes in dealt]
    assert tokens == [[50, 42], [50, 39]]


def test_order_is_new_every_epoch_and_fixed_by_the_seed():
    one, twin, other = batches([1] * 50, 10), batches([1] * 50, 10), batches([1] * 50, 10, seed=1)
    first = one.order().tolist()
    assert first == twin.order().tolist() != other.order().tolist()
    one.set_epoch(1)
    assert sorted(one.order().tolist()) == sorted(first) and one.order().tolist() != first
    assert batches([1] * 5, 2, seed=None).order().tolist() == [0, 1, 2, 3, 4]


def test_by_count_keeps_the_order():
    assert by_count([3, 1, 4, 1, 5], 2) == [[3, 1], [4, 1], [5]]


@pytest.mark.parametrize(("capacity", "expected"), [(10, [[2], [0, 1]]), (3, [[0], [1], [2]]), (100, [[0, 1, 2]])])
def test_by_tokens_by_hand(capacity, expected):
    assert by_tokens([0, 1, 2], np.array([4, 5, 11]), capacity) == expected
