import itertools
import time

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import pack_dataset

from smolpost.data.packing import best_fit_decreasing, stable_argsort, unpacked, wrapped

LENGTHS = st.lists(st.integers(1, 12), max_size=40)


def packs_of(plan):
    """[[(document, start, stop)]], pack by pack."""
    pieces = list(zip(plan.document.tolist(), plan.start.tolist(), plan.stop.tolist(), strict=True))
    return [pieces[a:b] for a, b in itertools.pairwise(plan.pack_offsets.tolist())]


def naive_best_fit_decreasing(lengths, capacity):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def fewest_packs(lengths, capacity):
    """The optimum by trying every assignment of small cases."""
    best = len(lengths)

    def place(rest, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if not rest:
            best = len(rooms)
            return
        for i in range(len(rooms)):
            if rooms[i] >= rest[0]:
                place(rest[1:], [*rooms[:i], rooms[i] - rest[0], *rooms[i + 1 :]])
        place(rest[1:], [*rooms, capacity - rest[0]])

    place(lengths, [])
    return best


def test_best_fit_decreasing_by_hand():
    # 7 opens a pack, 6 another, 5 another; 4 fits beside 6, then 3 beside 7, then 2 and 2 beside 5 and itself.
    plan = best_fit_decreasing([2, 7, 3, 6, 2, 4, 5], 10)
    assert packs_of(plan) == [[(0, 0, 2), (4, 0, 2), (6, 0, 5)], [(1, 0, 7), (2, 0, 3)], [(3, 0, 6), (5, 0, 4)]]


def test_wrapped_by_hand():
    plan = wrapped([3, 5, 1], 4)
    assert packs_of(plan) == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 5)], [(2, 0, 1)]]
    assert plan.pack_lengths().tolist() == [4, 4, 1]


def test_wrapped_cuts_one_document_over_many_packs():
    assert packs_of(wrapped([9], 4)) == [[(0, 0, 4)], [(0, 4, 8)], [(0, 8, 9)]]


def test_unpacked_is_one_document_per_pack():
    assert packs_of(unpacked([3, 5])) == [[(0, 0, 3)], [(1, 0, 5)]]


@given(LENGTHS)
def test_best_fit_decreasing_equals_the_naive_reference(lengths):
    plan = best_fit_decreasing(lengths, 12)
    assert sorted((12 - plan.pack_lengths()).tolist()) == naive_best_fit_decreasing(lengths, 12)


@given(LENGTHS)
def test_best_fit_decreasing_loses_and_cuts_no_document(lengths):
    plan = best_fit_decreasing(lengths, 12)
    assert sorted(plan.document.tolist()) == list(range(len(lengths)))
    assert plan.start.tolist() == [0] * len(lengths)
    assert plan.stop.tolist() == [lengths[d] for d in plan.document]
    packs = packs_of(plan)
    assert all(pack == sorted(pack) for pack in packs)  # documents in their own order
    assert packs == sorted(packs)  # packs by their earliest document
    assert plan.pack_lengths().max(initial=0) <= 12


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=9))
def test_best_fit_decreasing_is_within_its_bound_of_the_optimum(lengths):
    assert best_fit_decreasing(lengths, 10).num_packs <= 11 / 9 * fewest_packs(lengths, 10) + 1


@settings(max_examples=50, deadline=None)
@given(LENGTHS.filter(bool))
def test_best_fit_decreasing_never_needs_more_packs_than_trl_in_one_batch(lengths):
    rows = datasets.Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    theirs = pack_dataset(rows, 12, "bfd", {"batch_size": len(lengths)})
    assert sum(map(sum, theirs["seq_lengths"])) == sum(lengths)  # TRL cut nothing
    assert best_fit_decreasing(lengths, 12).num_packs <= len(theirs)


def test_best_fit_decreasing_needs_fewer_packs_than_trl_in_its_batches():
    # The first batch of 1000 ends with eleven packs of 7, each with room for a 5 that is in the next batch.
    lengths = [12] * 989 + [7] * 11 + [5] * 11
    theirs = pack_dataset(datasets.Dataset.from_dict({"input_ids": [[0] * length for length in lengths]}), 12, "bfd")
    assert (best_fit_decreasing(lengths, 12).num_packs, len(theirs)) == (1000, 1006)


@given(LENGTHS, st.integers(1, 15))
def test_wrapped_keeps_every_token_in_order_and_fills_all_packs_but_the_last(lengths, capacity):
    plan = wrapped(lengths, capacity)
    tokens = [(d, i) for d, a, b in itertools.chain(*packs_of(plan)) for i in range(a, b)]
    assert tokens == [(d, i) for d, length in enumerate(lengths) for i in range(length)]
    assert (plan.pack_lengths()[:-1] == capacity).all()
    assert plan.num_packs == -(-sum(lengths) // capacity)


@pytest.mark.parametrize("strategy", [unpacked, lambda x: wrapped(x, 4), lambda x: best_fit_decreasing(x, 4)])
def test_no_documents_make_no_packs(strategy):
    assert strategy([]).num_packs == 0


def test_lengths_out_of_range_are_refused():
    with pytest.raises(ValueError, match="document 1 has 11 tokens, above the capacity 10"):
        best_fit_decreasing([3, 11], 10)
    with pytest.raises(ValueError, match="document 1 has 0 tokens, below 1"):
        wrapped([3, 0], 10)
    with pytest.raises(ValueError, match="capacity=0 is below 1"):
        wrapped([3], 0)


@pytest.mark.parametrize("highest", [9, 2**16, 2**40])
def test_stable_argsort_equals_numpys(highest):
    keys = np.random.default_rng(0).integers(highest, size=1000)
    np.testing.assert_array_equal(stable_argsort(keys), np.argsort(keys, kind="stable"))


def test_a_million_lengths_are_packed_to_the_lower_bound_in_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(6.5, 1.2, 1_000_000).astype(int), 1, 65536)
    began = time.process_time()
    plan = best_fit_decreasing(lengths, 65536)
    assert time.process_time() - began < 5  # about 0.3 s on an idle core
    assert plan.num_packs == -(-lengths.sum() // 65536)
