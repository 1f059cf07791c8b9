"""Prepared rows to a batch of tensors.

B rows, T tokens of all packs of a micro-batch together, L tokens of the longest sequence.
"""

from dataclasses import dataclass

import torch

IGNORE_INDEX = -100


class SFTCollator:
    """Packs of a micro-batch, flattened into one row.

    Documents are told apart by position_ids alone: transformers isolates them where it gets no attention mask.
    """

    def __call__(self, packs: list[dict]) -> dict[str, torch.Tensor]:
        """
        Args:
            packs: Rows of a dataset by prepare_sft.
        Returns:
            input_ids, labels, position_ids: [1, T] int64; positions restart at 0 with every document.
        """
        lengths = torch.cat([as_ids(pack["seq_lengths"]) for pack in packs])
        starts = lengths.cumsum(0) - lengths
        position_ids = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
        return {
            "input_ids": torch.cat([as_ids(pack["input_ids"]) for pack in packs])[None],
            "labels": torch.cat([as_ids(pack["labels"]) for pack in packs])[None],
            "position_ids": position_ids[None],
        }


@dataclass(frozen=True)
class PreferenceCollator:
    """Pairs in the layout of TRL's DataCollatorForPreference, with a mask that leaves out user and tool turns."""

    pad_token_id: int

    def __call__(self, pairs: list[dict]) -> dict[str, torch.Tensor]:
        """
        Args:
            pairs: B rows of a dataset by prepare_apo.
        Returns:
            input_ids, attention_mask, completion_mask: [2 * B, L] int64, padded on the right; the B chosen sequences,
            then the B rejected ones. completion_mask is 1 where the policy is scored.
        """
        ids, masks = [], []
        for side in ("chosen", "rejected"):
            for pair in pairs:
                prompt = as_ids(pair["prompt_ids"])
                ids.append(torch.cat((prompt, as_ids(pair[f"{side}_ids"]))))
                masks.append(torch.cat((torch.zeros_like(prompt), as_ids(pair[f"{side}_mask"]))))
        return {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([torch.ones_like(sequence) for sequence in ids], 0),
            "completion_mask": padded(masks, 0),
        }


def as_ids(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int64)


def padded(sequences: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)
