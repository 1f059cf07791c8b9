import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolpost.data.collate import PARTS, collate_packs, collate_pairs


def test_packs_become_one_row_whose_positions_restart_with_every_document():
    packs = [
        {"input_ids": [5, 6, 7, 8, 9], "fates": [7, 0, 0, 7, 0], "seq_lengths": [3, 2]},
        {"input_ids": [1, 2], "fates": [4, 0], "seq_lengths": [1, 1]},
    ]
    batch = collate_packs(packs)
    assert batch.pop("document_lengths") == [3, 2, 1, 1]
    assert batch.pop("token_weights").tolist() == [1.0] * 7
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 1, 2]],
        "labels": [[-100, 6, 7, -100, 9, -100, 2]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 0]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_pairs_by_hand():
    pairs = [
        {  # the prompt's last token is the shared beginning of both completions, and scored
            "prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6],
            "prompt_mask": [0, 0, 1], "chosen_mask": [0, 1], "rejected_mask": [1],
        },
        {
            "prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10],
            "prompt_mask": [0], "chosen_mask": [1], "rejected_mask": [1, 1],
        },
    ]  # fmt: skip
    batch = collate_pairs(pairs)
    assert batch.pop("pair_lengths") == [(3, 2, 1), (1, 1, 2)]
    assert batch.pop("pair_weights").tolist() == [1.0, 1.0]
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]],
        "position_ids": [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]],
        "positions": [1, 3, 2, 6, 6, 8],  # of what predicts 3, 5, 6 and 8, 9, 10
        "targets": [3, 5, 6, 8, 9, 10],
        "side_tokens": [0, 1, 0, 2, 3, 4, 5],
        "sides": [0, 0, 1, 1, 2, 3, 3],
        "side_lengths": [2, 2, 1, 2],
        "of_chosen": [0, 1, 4],
    }


PAIRS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(PAIRS, st.integers(0, 2**32 - 1))
def test_pairs_score_what_two_separate_sequences_score(lengths, seed):
    """Side by side with the naive layout: the same targets, each after the same context."""
    rng, pairs, expected = np.random.default_rng(seed), [], []
    for numbers in lengths:
        pair = {f"{part}_ids": rng.integers(1, 99, n) for part, n in zip(PARTS, numbers, strict=True)}
        pair |= {f"{part}_mask": rng.integers(0, 2, n) for part, n in zip(PARTS, numbers, strict=True)}
        pair["prompt_mask"][0] = 0  # nothing predicts the first token
        pairs.append(pair)
        for side in PARTS[1:]:
            ids = np.concatenate((pair["prompt_ids"], pair[f"{side}_ids"])).tolist()
            mask = np.concatenate((pair["prompt_mask"], pair[f"{side}_mask"]))
            expected.append([(tuple(ids[:i]), ids[i]) for i in np.flatnonzero(mask)])

    batch = collate_pairs(pairs)
    ids = batch["input_ids"][0].tolist()
    contexts = []  # of every position: what it sees, itself included
    start = 0
    for prompt, chosen, rejected in batch["pair_lengths"]:
        shared = ids[start : start + prompt]
        for i in range(prompt + chosen):
            contexts.append(tuple(ids[start : start + i + 1]))
        for i in range(rejected):
            contexts.append((*shared, *ids[start + prompt + chosen : start + prompt + chosen + i + 1]))
        start += prompt + chosen + rejected
    assert [len(context) - 1 for context in contexts] == batch["position_ids"][0].tolist()
    found = [[] for _ in expected]
    for token, side in zip(batch["side_tokens"].tolist(), batch["sides"].tolist(), strict=True):
        found[side].append((contexts[batch["positions"][token]], batch["targets"][token].item()))
    assert found == expected
    assert batch["side_lengths"].tolist() == [len(side) for side in expected]


def test_weights_of_documents_and_pairs_follow_their_tokens():
    packs = [
        {"input_ids": [5, 6, 7], "fates": [0, 0, 0], "seq_lengths": [1, 2], "seq_weights": [0.5, 2.0]},
        {"input_ids": [8], "fates": [0], "seq_lengths": [1], "seq_weights": [3.0]},
    ]
    assert collate_packs(packs)["token_weights"].tolist() == [0.5, 2.0, 2.0, 3.0]
    pair = {f"{part}_{what}": [1] for part in PARTS for what in ("ids", "mask")}
    assert collate_pairs([pair | {"weights": [0.5]}, pair | {"weights": [2.0]}])["pair_weights"].tolist() == [0.5, 2.0]
