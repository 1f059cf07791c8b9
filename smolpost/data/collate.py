"""Prepared rows to the tensors of one forward pass: always one flattened row, never padding.

T tokens of all rows together, S scored tokens, P pairs.
"""

from collections.abc import Iterable

import torch

from smolpost.chat.fates import Fate

IGNORE_INDEX = -100
PARTS = ("prompt", "chosen", "rejected")  # of a preference pair, in the order they are laid out


def collate_packs(packs: list[dict]) -> dict:
    """Packs of documents, one after another.

    Args:
        packs: Rows of a dataset by prepare_documents.
    Returns:
        input_ids, labels, position_ids: [1, T] int64; labels are the ids of trained tokens, not shifted, and
            IGNORE_INDEX elsewhere; positions restart with every document.
        document_lengths: Tokens of each document, plain ints, so that attention need not ask the device.
        token_weights: [T] float32 weight of each token's loss.
    """
    lengths = torch.cat([_as_ids(pack["seq_lengths"]) for pack in packs])
    starts = lengths.cumsum(0) - lengths
    position_ids = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
    weights = torch.cat([_as_weights(pack.get("seq_weights"), len(pack["seq_lengths"])) for pack in packs])
    input_ids = torch.cat([_as_ids(pack["input_ids"]) for pack in packs])
    is_trained = torch.cat([_as_ids(pack["fates"]) for pack in packs]) == Fate.TRAINED
    return {
        "input_ids": input_ids[None],
        "labels": input_ids.where(is_trained, IGNORE_INDEX)[None],
        "position_ids": position_ids[None],
        "document_lengths": lengths.tolist(),
        "token_weights": weights.repeat_interleave(lengths),
    }


def collate_pairs(pairs: list[dict]) -> dict:
    """Preference pairs as `prompt | chosen | rejected`, one after another.

    Args:
        pairs: P rows of a dataset by prepare_pairs.
    Returns:
        input_ids, position_ids: [1, T] int64; chosen and rejected both count on from their prompt.
        pair_lengths: (prompt, chosen, rejected) tokens of each pair, plain ints.
        positions, targets: [S] int64: where each scored token is predicted from, and its id. Every pair's tokens come
            as scored in its prompt (a completion's shared beginning), in chosen, in rejected.
        side_tokens: [at least S] int64 into the scored tokens, side after side: pair 0 chosen, pair 0 rejected, pair 1
            chosen, ...; shared tokens belong to both sides.
        sides: Same shape, 0 to 2P - 1: the side to which each of them belongs.
        side_lengths: [2P] int64 scored tokens of each side.
        of_chosen: [at most as many] int64 where in side_tokens those of chosen sides are.
        pair_weights: [P] float32 weight of each pair's loss.
    """
    ids, position_ids, positions, targets, side_tokens, side_lengths, pair_lengths = ([] for _ in range(7))
    start = num_scored = 0
    for pair in pairs:
        parts = [_as_ids(pair[f"{part}_ids"]) for part in PARTS]
        sequence = torch.cat(parts)
        prompt, chosen, rejected = (len(part) for part in parts)
        is_scored = torch.cat([torch.as_tensor(pair[f"{part}_mask"]) for part in PARTS]) != 0
        part_of = torch.arange(3).repeat_interleave(torch.tensor((prompt, chosen, rejected)))[is_scored]
        # A token is predicted from the one before it; the first token of both sides from the prompt's last.
        before = torch.arange(-1, len(sequence) - 1)
        before[prompt + chosen] = prompt - 1
        scored = torch.arange(num_scored, num_scored + len(part_of))
        sides = [scored[part_of != other] for other in (2, 1)]

        ids.append(sequence)
        position_ids += [torch.arange(prompt + chosen), torch.arange(prompt, prompt + rejected)]
        positions.append(start + before[is_scored])
        targets.append(sequence[is_scored])
        side_tokens += sides
        side_lengths += [len(side) for side in sides]
        pair_lengths.append((prompt, chosen, rejected))
        start += len(sequence)
        num_scored += len(scored)
    side_lengths = torch.tensor(side_lengths)
    sides = torch.arange(len(side_lengths)).repeat_interleave(side_lengths)
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat(position_ids)[None],
        "pair_lengths": pair_lengths,
        "positions": torch.cat(positions),
        "targets": torch.cat(targets),
        "side_tokens": torch.cat(side_tokens),
        "sides": sides,
        "side_lengths": side_lengths,
        "of_chosen": (sides % 2 == 0).nonzero()[:, 0],
        "pair_weights": torch.cat([_as_weights(pair.get("weights"), 1) for pair in pairs]),
    }


def _as_ids(values: Iterable[int]) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int64)


def _as_weights(values: Iterable[float] | None, number: int) -> torch.Tensor:
    """[number] float32; all 1 if the rows were prepared without weights."""
    return torch.ones(number) if values is None else torch.as_tensor(values, dtype=torch.float32)
