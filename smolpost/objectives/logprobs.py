"""Log-probabilities, entropy and accuracy of given tokens, without their [T, V] logits.

The logits of some tokens and some words, a tile, are made where a cache can hold them, folded into statistics and
turned in place into their own gradient. Nothing here knows of sequences, masks or losses: the caller selects the
hidden states that predict the tokens it trains on.

T tokens, V words of the vocabulary, H hidden, t tokens and c words of a tile. Tiles are stored [c, t]: with tokens
innermost, all three matrix products read and write them as they lie.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from smolpost.objectives.head import Head
from smolpost.objectives.tiling import Tiling, multiply

# Sums of exponentials within which a tile needs no shift: far inside fp32 and bf16, far outside common logits.
SAFE_MASS = (1e-25, 1e25)


class TokenScores(NamedTuple):
    """Scores of T tokens.

    Attributes:
        logps: [T] log-probabilities, nats, at most 0.
        entropy: [T] entropy of each predicted distribution, nats, without gradient; None without metrics.
        is_top1: [T] bool, whether the target is the most likely word, the first of equals; None without metrics.
        total: Scalar sum(weights * logps); None without weights.
    """

    logps: Tensor
    entropy: Tensor | None
    is_top1: Tensor | None
    total: Tensor | None


def token_scores(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    weights: Tensor | None = None,
    metrics: bool = True,
    tile_bytes: int | None = None,
) -> TokenScores:
    """Score each target under the hidden state that predicts it.

    Without `weights`, `logps` carry the gradient, and backward makes the logits again: 4 matrix products in all.
    With `weights`, only `total` carries it: the gradient is made beside the logits, in the forward pass, and backward
    scales it: 3 products, and one backward per forward. No gradient is made where none is wanted.

    The products read hidden and weight in autocast's dtype, or hidden's where there is none. They sum in fp32, and
    all else is fp32 (fp64 where hidden is). Memory, besides results: the tiles, the fp32 gradient [V, H] of a weight
    that trains, and a weight that is not in the products' dtype once more in that dtype.

    Args:
        hidden: [T, H]; for T = 0 all results are empty or 0, and connected to the graph.
        targets: [T] int64, 0 to V - 1. Best on the CPU, wherever hidden is: given on a GPU, the host has to wait for
            them, and for nothing else here.
        head: Its weight may be tied, frozen, sharded (FSDP2's DTensor) or partitioned (DeepSpeed's ZeRO-3).
        weights: [T], what the loss multiplies each logp with; without gradient.
        metrics: Whether to compute entropy and is_top1.
        tile_bytes: Bound on the tiles' memory; by default what was measured fastest, 128 MiB at most on a CPU.
    Raises:
        ValueError: Shapes differ, a target lies outside the vocabulary, or `weights` requires a gradient.
    """
    weight, bias = unsharded(head.weight), unsharded(head.bias)
    with gathered(weight, bias):
        check_arguments(hidden, targets, weight, weights)
        trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        one_pass = weights is not None and trains
        tiling = Tiling(hidden, targets, weight, head, metrics, one_pass, tile_bytes)
        with torch.autocast(hidden.device.type, enabled=False):
            if one_pass:
                total, *scores = WeightedSum.apply(hidden, weight, bias, weights, tiling)
            else:
                scores = LogProbs.apply(hidden, weight, bias, tiling)
                total = None if weights is None else torch.dot(weights.to(tiling.dtype), scores[0])
    return TokenScores(*scores, total)


def check_arguments(hidden: Tensor, targets: Tensor, weight: Tensor, weights: Tensor | None) -> None:
    """Refuse what would give wrong numbers or an unreadable error further down."""
    if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {list(hidden.shape)}, the head takes [T, {weight.shape[1]}]")
    for name, x in (("targets", targets), ("weights", weights)):
        if x is not None and x.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {list(x.shape)}, hidden states need [{len(hidden)}]")
    if weights is not None and weights.requires_grad:
        raise ValueError("weights require a gradient; detach them, or use logps, which carry one without weights")
    if len(targets):
        low, high = torch.stack(targets.aminmax()).tolist()
        if low < 0 or high >= len(weight):
            raise ValueError(f"targets lie in {low} to {high}, the vocabulary in 0 to {len(weight) - 1}")


class Sums:
    """A token slice's sums over each slice of words, [number of word slices, t], and what is at its targets, [t].

    Attributes:
        masses, moments: Sums of e = exp(x) and of x e, where x are logits less the shift.
        peaks, tops: Largest logit, and the first word of the slice that has it.
        shifts: The shift of each slice where it is found on the way: the largest logit up to there.
        logit, slope: Logit, and the softcap's slope, of the target.
    """

    def __init__(self, tiling: Tiling, t: int, like: Tensor):
        shape = (len(tiling.words), t)
        self.masses = tiling.buffer(*shape, like=like)
        self.peaks = tiling.buffer(*shape, like=like) if tiling.metrics or tiling.unread else None
        self.tops = tiling.buffer(*shape, like=like, dtype=torch.int64) if tiling.metrics and tiling.unread else None
        self.shifts = tiling.buffer(*shape, like=like) if tiling.unread else None
        self.moments = tiling.buffer(*shape, like=like) if tiling.makes_entropy else None
        self.logit = tiling.buffer(t, like=like)
        self.slope = tiling.buffer(t, like=like) if tiling.softcap and tiling.kept else None


class Statistics:
    """What is known of each of T tokens once all its logits have been seen.

    Attributes:
        logps, entropy, is_top1: As in TokenScores.
        mass: [T] sum of exp(logit - shift).
        shift: [T] 0, or the largest logit once `shifted`.
        shifted: Whether some token's mass left SAFE_MASS; from its slice on, all tokens are shifted. True from the
            beginning where nobody may look at the mass.
    """

    def __init__(self, tiling: Tiling, hidden: Tensor):
        self.tiling, self.shifted = tiling, tiling.unread
        self.logps, self.mass = (tiling.buffer(len(hidden), like=hidden) for _ in range(2))
        self.shift = torch.full_like(self.mass, -math.inf if tiling.unread else 0)
        self.entropy = torch.empty_like(self.mass) if tiling.metrics else None
        self.is_top1 = torch.empty_like(self.mass, dtype=torch.bool) if tiling.metrics else None
        # A kept tile can hold its logits, then their exponentials, where nothing needs both and the dtype is wide.
        apart = not tiling.kept or tiling.makes_entropy or tiling.mixed
        self.logit_buffer = tiling.buffer(tiling.elements, like=hidden) if apart else None
        apart = tiling.makes_entropy and (not tiling.kept or tiling.mixed)
        self.exp_buffer = tiling.buffer(tiling.elements, like=hidden) if apart else None

    def fold(self, i: int, states: Tensor, heads: list, kept: list[Tensor] | None = None) -> Sums:
        """Fill in the statistics of token slice i.

        Args:
            states: [t, H] operands.
            heads: What `Tiling.head_tiles` gives.
            kept: Tiles [c, t] that receive exp(logit - shift), times the softcap's slope.
        """
        span = self.tiling.tokens[i]
        logits = kept if self.logit_buffer is None else self.tiling.tiles(self.logit_buffer, len(states))
        while True:
            if self.shifted and not self.tiling.unread:
                self.shift[span] = self.peak(states, heads, logits)
            sums = self.sweep(i, states, heads, logits, kept)
            mass = sums.masses.sum(0)
            # Logits are rarely so large that exponentials need the shift by the maximum that softmax always makes:
            # a pass over the tile, and a maximum that has to be known beforehand. NaN fails both comparisons.
            if self.shifted or bool(((mass > SAFE_MASS[0]) & (mass < SAFE_MASS[1])).all()):
                break
            self.shifted = True
        self.mass[span] = mass
        self.conclude(i, states, heads, sums)
        return sums

    def peak(self, states: Tensor, heads: list, logits: list[Tensor]) -> Tensor:
        """[t] largest logits."""
        peaks = []
        for (words, bias), x in zip(heads, logits, strict=True):
            self.tiling.logits(x, states, words, bias)
            peaks.append(x.amax(0))
        return torch.stack(peaks).amax(0)

    def sweep(self, i: int, states: Tensor, heads: list, logits: list[Tensor], kept: list[Tensor] | None) -> Sums:
        """Make each tile of a token slice and sum it up while it is hot."""
        tiling, span = self.tiling, self.tiling.tokens[i]
        sums, shift = Sums(tiling, len(states), states), self.shift[span]
        exps = logits if kept is None or tiling.mixed else kept
        if self.exp_buffer is not None:
            exps = tiling.tiles(self.exp_buffer, len(states))
        for j, ((words, bias), x, e) in enumerate(zip(heads, logits, exps, strict=True)):
            slope = tiling.logits(x, states, words, bias)
            here = tiling.targets_in(i, j)
            if here.start < here.stop:
                there = slice(here.start - span.start, here.stop - span.start)
                torch.index_select(x.view(-1), 0, tiling.place[here], out=sums.logit[there])
                if sums.slope is not None:
                    torch.index_select(slope.view(-1), 0, tiling.place[here], out=sums.slope[there])
            if sums.tops is not None:
                torch.max(x, 0, out=(sums.peaks[j], sums.tops[j]))
            elif sums.peaks is not None:
                torch.amax(x, 0, out=sums.peaks[j])
            if sums.shifts is not None:
                shift = torch.maximum(shift, sums.peaks[j], out=sums.shifts[j])
            if self.shifted:
                x.sub_(shift)
            torch.exp(x, out=e)
            torch.sum(e, 0, out=sums.masses[j])
            if tiling.makes_entropy:
                torch.sum(x.mul_(e), 0, out=sums.moments[j])
            if kept is not None and slope is not None:
                e.mul_(slope)
            if kept is not None and tiling.mixed:
                kept[j].copy_(e)
        if sums.shifts is not None:
            self.shift[span] = shift
            self.to_one_shift(sums, kept)
        return sums

    def to_one_shift(self, sums: Sums, kept: list[Tensor] | None) -> None:
        """Turn what was summed under each slice's own shift into what the last, largest shift gives."""
        change = sums.shifts - sums.shifts[-1]
        factors = change.exp()
        sums.masses.mul_(factors)
        if sums.moments is not None:
            sums.moments.mul_(factors).addcmul_(change, sums.masses)
        if kept is not None:
            for tile, factor in zip(kept, factors, strict=True):
                tile.mul_(factor)

    def conclude(self, i: int, states: Tensor, heads: list, sums: Sums) -> None:
        """Turn a token slice's sums into its scores."""
        tiling, span = self.tiling, self.tiling.tokens[i]
        order, column, home = tiling.order[span], tiling.column[span], tiling.home[span]
        log_mass = self.mass[span].log()
        logps = (sums.logit - self.shift[span][column] - log_mass[column]).clamp_max_(0)
        self.logps[order] = logps
        if tiling.makes_entropy:
            self.entropy[span] = (log_mass - sums.moments.sum(0) / self.mass[span]).clamp_min_(0)
        if tiling.metrics:
            peak, first = sums.peaks.max(0)
            is_top1 = (sums.logit == peak[column]) & (first[column] == home)
            if sums.tops is not None:
                is_top1 &= sums.tops[home, column] == tiling.row[span]
            else:
                self.break_ties(i, states, heads, is_top1, logps)
            self.is_top1[order] = is_top1

    def break_ties(self, i: int, states: Tensor, heads: list, is_top1: Tensor, logps: Tensor) -> None:
        """Clear is_top1 [t], in `order`, where an equal comes before the target in the target's own tile."""
        tiling, span = self.tiling, self.tiling.tokens[i]
        column, home = tiling.column[span], tiling.home[span]
        # Such an equal leaves a word at most half of the probability.
        doubtful = (is_top1 & (logps < -0.69)).nonzero().flatten()
        for j in home[doubtful].unique().tolist():
            tied = doubtful[home[doubtful] == j]
            x = tiling.buffer(len(heads[j][0]), len(tied), like=states)
            tiling.logits(x, states[column[tied]], *heads[j])
            is_top1[tied] = x.argmax(0) == tiling.row[span][tied]


class Gradients:
    """Gradients with respect to hidden, weight and bias, summed tile by tile; None where not needed.

    A tile here is minus the gradient of the logits but for a factor of each token. That factor is applied to the
    operand [t, H] and to the result [t, H] of the products, which are smaller than the tile.
    """

    def __init__(self, tiling: Tiling, inputs: tuple[Tensor, Tensor, Tensor | None], needed: tuple[bool, ...]):
        self.tiling, self.inputs = tiling, inputs
        hidden, weight, bias = inputs
        self.hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None
        # The first slice of tokens writes, the others add: zeros are for the case that there is none.
        make = torch.empty if tiling.tokens else torch.zeros
        self.weight = make(weight.shape, dtype=tiling.dtype, device=hidden.device) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=tiling.dtype) if needed[2] else None

    def begin(self, i: int, states: Tensor, factor: Tensor) -> None:
        """Turn to token slice i: states [t, H], factor [t]."""
        self.i, self.factor = i, factor
        if self.weight is not None:
            self.scaled = (states * factor[:, None]).to(states.dtype)
        if self.hidden is not None:
            self.states_sum = self.tiling.buffer(states.shape[1], len(states), like=states)

    def add(self, j: int, tile: Tensor, words: Tensor) -> None:
        """Add what tile [c, t] of word slice j contributes; words [c, H] are its operands."""
        span = self.tiling.words[j]
        if self.weight is not None:
            multiply(tile, self.scaled, self.weight[span], add=self.i > 0)
        if self.hidden is not None:
            multiply(words.t(), tile, self.states_sum, add=j > 0)
        if self.bias is not None:
            self.bias[span].addmv_(tile.to(self.tiling.dtype), self.factor)

    def end(self) -> None:
        """Close the token slice."""
        if self.hidden is not None:
            self.hidden[self.tiling.tokens[self.i]] = self.states_sum.mul_(self.factor).t()

    def results(self) -> list[Tensor | None]:
        """Gradients in the inputs' dtypes."""
        sums = (self.hidden, self.weight, self.bias)
        return [None if x is None else x.to(y.dtype) for x, y in zip(sums, self.inputs, strict=True)]


class LogProbs(torch.autograd.Function):
    """Scores of which logps [T] carry a gradient; backward makes the tiles again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tiling: Tiling) -> tuple:
        statistics, heads = Statistics(tiling, hidden), tiling.head_tiles(weight, bias)
        for i, span in enumerate(tiling.tokens):
            statistics.fold(i, tiling.operand(hidden[span]), heads)
        ctx.tiling, ctx.shifted = tiling, statistics.shifted
        ctx.save_for_backward(hidden, weight, bias, statistics.logps, statistics.mass, statistics.shift)
        ctx.mark_non_differentiable(*(x for x in (statistics.entropy, statistics.is_top1) if x is not None))
        return statistics.logps, statistics.entropy, statistics.is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple:
        tiling = ctx.tiling
        hidden, weight, bias, logps, mass, shift = ctx.saved_tensors
        with gathered(weight, bias), torch.autocast(hidden.device.type, enabled=False):
            gradients = Gradients(tiling, (hidden, weight, bias), ctx.needs_input_grad)
            heads = tiling.head_tiles(weight, bias)
            buffer = tiling.buffer(tiling.elements, like=hidden)
            at_target = (torch.expm1(logps) * mass)[tiling.order]
            factor = -tiling.scale * upstream / mass
            for i, span in enumerate(tiling.tokens):
                states = tiling.operand(hidden[span])
                gradients.begin(i, states, factor[span])
                tiles = tiling.tiles(buffer, len(states))
                for j, ((words, bias_tile), tile) in enumerate(zip(heads, tiles, strict=True)):
                    slope = tiling.logits(tile, states, words, bias_tile)
                    if ctx.shifted:
                        tile.sub_(shift[span])
                    tile.exp_()
                    here = tiling.targets_in(i, j)
                    if here.start < here.stop:
                        tile.view(-1).index_copy_(0, tiling.place[here], at_target[here])
                    if slope is not None:
                        tile.mul_(slope)
                    gradients.add(j, tile.to(tiling.operand_dtype), words)
                gradients.end()
            return *gradients.results(), None


class WeightedSum(torch.autograd.Function):
    """The scalar sum(weights * logps), whose gradient is made in the forward pass, and the scores, which carry none."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor, tiling: Tiling
    ) -> tuple:
        statistics, heads = Statistics(tiling, hidden), tiling.head_tiles(weight, bias)
        gradients = Gradients(tiling, (hidden, weight, bias), ctx.needs_input_grad)
        weights = weights.to(tiling.dtype)
        height, width = tiling.words[0].stop, tiling.tokens[0].stop if tiling.tokens else 0
        store = tiling.buffer(len(weight) * width, like=hidden, dtype=tiling.operand_dtype)
        for i, span in enumerate(tiling.tokens):
            states = tiling.operand(hidden[span])
            kept = store[: len(weight) * len(states)].view(len(weight), len(states))
            tiles = kept.split(height)
            sums = statistics.fold(i, states, heads, tiles)
            mass, order = statistics.mass[span], tiling.order[span]
            # d logp / d logit is 1 - p at the target, from logp itself: as 1 minus a rounded p it would be lost.
            at_target = torch.expm1(statistics.logps[order]) * statistics.mass[order]
            if sums.slope is not None:
                at_target *= sums.slope
            place = tiling.home[span] * (height * len(states)) + tiling.place[span]
            kept.view(-1).index_copy_(0, place, at_target.to(kept.dtype))
            gradients.begin(i, states, -tiling.scale * weights[span] / mass)
            for j, (words, _) in enumerate(heads):
                gradients.add(j, tiles[j], words)
            if tiling.entropy_from_gradient:
                # The states' gradient is W[target] - sum(p W): times the states, logit[target] - sum(p logit).
                surplus = tiling.scale * (states.t() * gradients.states_sum).sum(0) / mass
                statistics.entropy[span] = (-statistics.logps[span] - surplus).clamp_min_(0)
            gradients.end()
        ctx.gradients, ctx.unread = gradients.results(), tiling.unread
        scores = statistics.logps, statistics.entropy, statistics.is_top1
        ctx.mark_non_differentiable(*(x for x in scores if x is not None))
        return torch.dot(weights, statistics.logps), *scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple:
        if ctx.gradients is None:
            raise RuntimeError("total has one backward; call token_scores again, or without weights")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            # On a CPU looking at the scalar costs nothing, and scaling by 1 a pass over [V, H].
            if gradient is not None and (ctx.unread or upstream != 1):
                gradient.mul_(upstream)
        return *gradients, None, None


def unsharded(x: Tensor | None) -> Tensor | None:
    """The whole of an FSDP2 parameter, connected to its shards; anything else as it is."""
    if not isinstance(x, DTensor):
        return x
    # Each rank has a gradient from its own tokens, and FSDP averages them; full_tensor takes them to be all the same.
    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def gathered(*parameters: Tensor | None) -> AbstractContextManager:
    """Hold parameters that DeepSpeed's ZeRO-3 has partitioned together, wherever the head is read outside its module.

    Those already whole stay out: a tied embedding may be in use by a module, and leaving would partition it again.
    """
    apart = {id(p): p for p in parameters if hasattr(p, "ds_id") and p.ds_status.name != "AVAILABLE"}
    if not apart:
        return nullcontext()
    import deepspeed  # an optional dependency, installed where such a parameter exists

    return deepspeed.zero.GatheredParameters(list(apart.values()))
