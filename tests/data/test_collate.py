import numpy as np
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from smolpost.data.collate import PreferenceCollator, SFTCollator


def test_packs_become_one_row_whose_positions_restart_with_every_document():
    packs = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]},
        {"input_ids": [1, 2], "labels": [-100, 2], "seq_lengths": [1, 1]},
    ]
    batch = SFTCollator()(packs)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 1, 2]],
        "labels": [[-100, 6, 7, -100, 9, -100, 2]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 0]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def pairs(rng):
    rows = []
    for _ in range(3):
        row = {
            key: rng.integers(1, 99, rng.integers(1, 9)).tolist()
            for key in ("prompt_ids", "chosen_ids", "rejected_ids")
        }
        rows.append(row | {f"{side}_mask": [1] * len(row[f"{side}_ids"]) for side in ("chosen", "rejected")})
    return rows


def test_pairs_equal_trls_collator_where_the_whole_completion_is_scored():
    for seed in range(20):
        rows = pairs(np.random.default_rng(seed))
        ours, trls = PreferenceCollator(pad_token_id=0)(rows), DataCollatorForPreference(pad_token_id=0)(rows)
        assert ours.keys() == trls.keys()
        for key, value in trls.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=0)


def test_completion_mask_leaves_out_what_is_not_scored():
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6], "chosen_mask": [1, 0, 1]}
    batch = PreferenceCollator(pad_token_id=9)([{**row, "rejected_mask": [1]}])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5], [1, 2, 6, 9, 9]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "completion_mask": [[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]],
    }
