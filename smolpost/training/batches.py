"""One global batch on any number of ranks: which rank takes which rows, and in which forward passes.

An optimizer step is `global_batch_size` rows, whatever the machine. Its rows are packed into forward passes, the passes
are dealt to the ranks, and every rank makes the same number of them, so no collective waits for a rank that has none.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from smolpost.data.packing import best_fit_decreasing

Passes = list[list[int]]  # rows of each forward pass


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank.

    Attributes:
        rows: Indices into the prepared rows, at least one.
        counts: False where the pass only keeps this rank in step with the others and adds nothing to the batch.
    """

    rows: list[int]
    counts: bool = True


class GlobalBatches(Sampler[list[MicroBatch]]):
    """The forward passes of one rank, in order of optimizer steps.

    Args:
        lengths: [N] tokens of each prepared row.
        global_batch_size: Rows per step; the last step of an epoch may have fewer.
        forward_passes: Rows of a step -> its forward passes: `by_count` or `by_tokens`.
        seed: Of the order, new every epoch; None keeps the rows in order.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        global_batch_size: int,
        forward_passes: Callable[[list[int]], Passes],
        *,
        seed: int | None,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.lengths = lengths
        self.global_batch_size = global_batch_size
        self.forward_passes = forward_passes
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Optimizer steps per epoch."""
        return -(-len(self.lengths) // self.global_batch_size)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        order = self.order()
        for first in range(0, len(order), self.global_batch_size):
            yield self.deal(order[first : first + self.global_batch_size].tolist())[self.rank]

    def order(self, epoch: int | None = None) -> np.ndarray:
        """[N] the rows as an epoch takes them; None: the present one."""
        if self.seed is None:
            return np.arange(len(self.lengths))
        return np.random.default_rng([self.seed, self.epoch if epoch is None else epoch]).permutation(len(self.lengths))

    def deal(self, rows: list[int]) -> list[list[MicroBatch]]:
        """Every rank's forward passes for the rows of one step; all ranks have the same number.

        Passes of many rows are halved until the ranks share them evenly; what is still missing is filled with passes
        that do not count. Ranks run passes of similar length at the same time.
        """
        passes = self.forward_passes(rows)
        while len(passes) % self.num_ranks and max(map(len, passes)) > 1:
            longest = max(range(len(passes)), key=lambda i: len(passes[i]))
            halved = passes.pop(longest)
            passes += [halved[: len(halved) // 2], halved[len(halved) // 2 :]]
        passes.sort(key=lambda taken: -int(self.lengths[taken].sum()))
        dealt = [MicroBatch(taken) for taken in passes]
        shortest = min(rows, key=lambda row: self.lengths[row])
        dealt += [MicroBatch([shortest], counts=False)] * (-len(dealt) % self.num_ranks)
        return [dealt[rank :: self.num_ranks] for rank in range(self.num_ranks)]

    def num_rows(self, steps: range) -> int:
        """Rows that these optimizer steps take, counted from 0 over all epochs."""
        last = len(self.lengths) - (len(self) - 1) * self.global_batch_size
        return sum(self.global_batch_size if (step + 1) % len(self) else last for step in steps)

    def idle_share(self) -> float:
        """Share of a full step's forward passes that do not count, in [0, 1)."""
        rows = self.order()[: self.global_batch_size].tolist()
        flags = [micro.counts for rank in self.deal(rows) for micro in rank]
        return flags.count(False) / len(flags)


def by_count(rows: list[int], micro_batch_size: int) -> Passes:
    """Forward passes of `micro_batch_size` rows, in order."""
    return [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]


def by_tokens(rows: list[int], lengths: np.ndarray, capacity: int) -> Passes:
    """Best-fit-decreasing packs of at most `capacity` tokens; a longer row has a pass of its own."""
    row_lengths = lengths[rows]
    passes = [[row] for row, length in zip(rows, row_lengths, strict=True) if length > capacity]
    fitting = np.asarray(rows)[row_lengths <= capacity]
    plan = best_fit_decreasing(lengths[fitting], capacity)
    return passes + [pack.tolist() for pack in np.split(fitting[plan.document], plan.pack_offsets[1:-1]) if len(pack)]
