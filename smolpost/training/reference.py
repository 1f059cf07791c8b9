"""Per-token log-probabilities of the reference: worked out once, kept for every seed, beta and learning rate."""

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from smolpost.data.collate import PARTS, collate_pairs
from smolpost.data.dataset_folder import list_lengths, list_sums
from smolpost.progress import Progress
from smolpost.training.batches import by_tokens
from smolpost.training.environment import Environment
from smolpost.training.reference_cache import ReferenceCache
from smolpost.training.scoring import Scored, score_tokens

VERSION = 1  # of what a reference gives for the same pairs, weights and precision
PAIR_COLUMNS = (*(f"{part}_{what}" for part in PARTS for what in ("ids", "mask")), "weights")


class PairsBesideReference(torch.utils.data.Dataset):
    """Prepared pairs with their reference's log-probabilities.

    Args:
        rows: A dataset by prepare_pairs.
        cache: Complete.
    """

    def __init__(self, rows: Dataset, cache: ReferenceCache):
        columns = [name for name in rows.column_names if name in PAIR_COLUMNS]
        self.rows = rows.with_format("numpy", columns=columns)
        self.cache = cache

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, pair: int) -> dict:
        return self.rows[pair] | {"ref_logps": self.cache.read(pair)}


def collate_beside_reference(pairs: list[dict]) -> dict:
    """`collate_pairs`, with ref_logps [S] fp32 in the order of its positions."""
    logps = np.concatenate([pair["ref_logps"] for pair in pairs])
    return collate_pairs(pairs) | {"ref_logps": torch.from_numpy(logps)}


def pair_lengths(rows: Dataset) -> np.ndarray:
    """[N] tokens of each pair, its prompt once."""
    return sum(list_lengths(rows, f"{part}_ids") for part in PARTS)


def scored_tokens(rows: Dataset) -> np.ndarray:
    """[N] scored tokens of each pair, shared ones once."""
    return sum(list_sums(rows, f"{part}_mask") for part in PARTS)


def fill(
    cache: ReferenceCache,
    rows: Dataset,
    load_reference: Callable[[], PreTrainedModel],
    pack_tokens: int,
    environment: Environment,
) -> int:
    """Compute this rank's missing part of the cache; the reference is loaded only if something is missing.

    Every rank holds the whole reference for this, as nothing else is in memory yet; chunk i belongs to rank i modulo
    the ranks, so they need not talk to one another.

    Returns:
        Pairs worked out by this rank.
    Raises:
        UserError: The reference gives log-probabilities that are not finite.
    """
    chunks = [chunk for chunk in cache.missing() if chunk % environment.world_size == environment.rank]
    if not chunks:
        return 0
    model = load_reference().to(environment.device).eval()
    score_tokens(model)
    arrays, lengths = rows.with_format("numpy"), pair_lengths(rows)
    total = sum(len(cache.pairs_of(chunk)) for chunk in chunks)
    with Progress("reference log-probabilities", total, "pair", shown=environment.rank == 0) as progress:
        for chunk in chunks:
            pairs = cache.pairs_of(chunk)
            found: dict[int, np.ndarray] = {}
            for taken in by_tokens(list(pairs), lengths, pack_tokens):
                logps = score_pairs(model, [arrays[pair] for pair in taken], environment)
                found |= dict(zip(taken, logps, strict=True))
                progress.update(len(taken))
            cache.write(chunk, [found[pair] for pair in pairs])
    return total


@torch.no_grad()
def score_pairs(model: PreTrainedModel, pairs: list[dict], environment: Environment) -> list[np.ndarray]:
    """Log-probabilities [scored tokens] of each pair, by the path that training takes."""
    batch = collate_pairs(pairs)
    tensors = {key: value.to(environment.device) for key, value in batch.items() if torch.is_tensor(value)}
    with torch.autocast(environment.device.type, torch.bfloat16, enabled=environment.bf16):
        scores = model(
            input_ids=tensors["input_ids"],
            position_ids=tensors["position_ids"],
            pair_lengths=batch["pair_lengths"],
            scored=Scored(tensors["positions"], batch["targets"], metrics=False),
        )
    counts = [sum(int(pair[f"{part}_mask"].sum()) for part in PARTS) for pair in pairs]
    return np.split(scores.logps.float().cpu().numpy(), np.cumsum(counts)[:-1])
