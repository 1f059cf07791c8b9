"""Log-probabilities, entropy and accuracy of given tokens, without their [T, V] logits.

The logits of some tokens and some words, a tile, are made where a cache can hold them, folded into statistics and
turned in place into their own gradient. Nothing here knows of sequences, masks or losses: the caller selects the
hidden states that predict the tokens it trains on.

T tokens, V words of the vocabulary, H hidden, t tokens and c words of a tile. Tiles are stored [c, t]: with tokens
innermost, all three matrix products read and write them as they lie.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial

from smolpost.objectives.head import Head

# Measured on CPUs with 2 MiB of L2 cache per core; the GPU's are reckoned from its bandwidth, not measured.
TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # of a tile that is to stay in cache (per core), or to fill a GPU
TILE_TOKENS = {"cpu": 512, "cuda": 4096}  # beyond these, rereading the weight no longer counts
KEPT_TOKENS = {"cpu": 256, "cuda": 4096}  # the same where the tokens' tiles are kept until the vocabulary is done
KEPT_BYTES = {"cpu": 2**27, "cuda": 2**30}  # of the tiles kept

BF16_INTO_FP32 = ("cuda",)  # devices whose matrix products read bf16 and write fp32

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
        targets: [T] int64, 0 to V - 1.
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
        plan = Plan(hidden, targets, weight, head, metrics, one_pass, tile_bytes)
        with torch.autocast(hidden.device.type, enabled=False):
            if one_pass:
                total, *scores = WeightedSum.apply(hidden, weight, bias, weights, plan)
            else:
                scores = LogProbs.apply(hidden, weight, bias, plan)
                total = None if weights is None else torch.dot(weights.to(plan.dtype), scores[0])
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


class Plan:
    """What the two directions of a call share: the cut into tiles, where targets lie in them, and the arithmetic.

    Attributes:
        tokens, words: Slices of the T tokens and of the V words; all but the last are of one length.
        elements: Elements of the largest tile.
        dtype: Of statistics and gradients.
        operand_dtype: Of what the matrix products read.
        kept: Whether a token's tiles are kept until the whole vocabulary is seen, then made its gradient.
        entropy_from_gradient: Whether the entropy falls out of the gradient, or needs sums of its own.
        order: [T] tokens in the order of the tiles their targets lie in; the next four are in this order.
        home, row, column, place: [T] index of the target's word slice; where in its tile it lies; where in it, flat.
    """

    def __init__(
        self,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        head: Head,
        metrics: bool,
        kept: bool,
        tile_bytes: int | None,
    ):
        device = hidden.device.type
        self.softcap, self.scale, self.metrics, self.kept = head.softcap, head.scale, metrics, kept
        self.rounding = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        self.dtype = torch.promote_types(self.rounding, torch.float32)
        # Elsewhere the rounded operands are multiplied as fp32, which gives the same numbers; products rounded to bf16
        # would not. As fp16, tiles would overflow.
        self.mixed = device in BF16_INTO_FP32 and self.rounding == torch.bfloat16
        self.operand_dtype = self.rounding if self.mixed else self.dtype
        linear = head.bias is None and not head.softcap
        self.entropy_from_gradient = kept and metrics and linear and hidden.requires_grad and not self.mixed

        elements, most_tokens, kept_tokens, kept_bytes = (
            by_device.get(device, by_device["cuda"])
            for by_device in (TILE_ELEMENTS, TILE_TOKENS, KEPT_TOKENS, KEPT_BYTES)
        )
        if most_tokens * weight.shape[1] > elements:
            elements = most_tokens * weight.shape[1]  # the products outweigh all else, and like tiles as wide as H
        elif kept:
            most_tokens = kept_tokens
        if device == "cpu":
            elements *= torch.get_num_threads()
        if self.makes_entropy or self.mixed:
            elements //= 2  # two tiles at a time
        if tile_bytes is not None:
            kept_bytes = tile_bytes
            elements = min(elements, tile_bytes // self.dtype.itemsize)
        most_tokens = max(most_tokens, elements // len(weight))  # all words of a small vocabulary make one tile
        if kept:
            most_tokens = min(most_tokens, kept_bytes // (len(weight) * self.operand_dtype.itemsize))
        self.tokens = even_slices(len(targets), min(most_tokens, elements))
        width = self.tokens[0].stop if self.tokens else 1
        self.words = even_slices(len(weight), elements // width)
        self.elements = width * self.words[0].stop
        self.locate(targets, width, self.words[0].stop)

    @property
    def makes_entropy(self) -> bool:
        return self.metrics and not self.entropy_from_gradient

    def locate(self, targets: Tensor, width: int, height: int) -> None:
        """Sort the targets by tile, once, so that no tile has to search for its own."""
        token = torch.arange(len(targets), device=targets.device)
        first = token // width * width
        tile = first // width * len(self.words) + targets // height
        self.order = tile.argsort()
        self.home, self.row, self.column = (x[self.order] for x in (targets // height, targets % height, token - first))
        self.place = self.row * (len(targets) - first).clamp_max(width)[self.order] + self.column
        self.ends = [0, *torch.bincount(tile, minlength=len(self.tokens) * len(self.words)).cumsum(0).tolist()]

    def targets_in(self, i: int, j: int) -> slice:
        """Where, in `order`, the targets of tile (tokens i, words j) are."""
        k = i * len(self.words) + j
        return slice(self.ends[k], self.ends[k + 1])

    def buffer(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=like.device, dtype=dtype or self.dtype)

    def tiles(self, buffer: Tensor, t: int) -> list[Tensor]:
        """Views [c, t] for all slices of words into one buffer that holds one tile at a time."""
        return [buffer[: (s.stop - s.start) * t].view(-1, t) for s in self.words]

    def operand(self, x: Tensor) -> Tensor:
        """Give x as the matrix products read it; x itself where it is so already."""
        return x.to(self.rounding).to(self.operand_dtype)

    def head_tiles(self, weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """[c, H] operands and [c, 1] biases of all slices of words."""
        weight = self.operand(weight)
        biases = [None] * len(self.words) if bias is None else [bias[s, None].to(self.dtype) for s in self.words]
        return [(weight[s], b) for s, b in zip(self.words, biases, strict=True)]

    def logits(self, out: Tensor, states: Tensor, words: Tensor, bias: Tensor | None) -> Tensor | None:
        """Write the logits of states [t, H] to out [c, t]; return the softcap's slope [c, t], if there is one."""
        multiply(words, states.t(), out)
        if bias is not None:
            out.add_(bias)
        if self.scale != 1:
            out.mul_(self.scale)
        if not self.softcap:
            return None
        out.div_(self.softcap).tanh_()
        slope = 1 - out.square()
        out.mul_(self.softcap)
        return slope


class Sums:
    """A token slice's sums over each slice of words, [number of word slices, t], and what is at its targets, [t]."""

    def __init__(self, plan: Plan, t: int, like: Tensor):
        shape = (len(plan.words), t)
        self.masses = plan.buffer(*shape, like=like)
        self.peaks = plan.buffer(*shape, like=like) if plan.metrics else None
        self.moments = plan.buffer(*shape, like=like) if plan.makes_entropy else None
        self.logit = plan.buffer(t, like=like)
        self.slope = plan.buffer(t, like=like) if plan.softcap and plan.kept else None


class Statistics:
    """What is known of each of T tokens once all its logits have been seen.

    Attributes:
        logps, entropy, is_top1: As in TokenScores.
        mass: [T] sum of exp(logit - shift).
        shift: [T] 0, or the largest logit once `shifted`.
        shifted: Whether some token's mass left SAFE_MASS; from its slice on, all tokens are shifted.
    """

    def __init__(self, plan: Plan, hidden: Tensor):
        self.plan, self.shifted = plan, False
        self.logps, self.mass = (plan.buffer(len(hidden), like=hidden) for _ in range(2))
        self.shift = torch.zeros_like(self.mass)
        self.entropy = torch.empty_like(self.mass) if plan.metrics else None
        self.is_top1 = torch.empty_like(self.mass, dtype=torch.bool) if plan.metrics else None
        # A kept tile can hold its logits, then their exponentials, where nothing needs both and the dtype is wide.
        apart = not plan.kept or plan.makes_entropy or plan.mixed
        self.logit_buffer = plan.buffer(plan.elements, like=hidden) if apart else None
        apart = plan.makes_entropy and (not plan.kept or plan.mixed)
        self.exp_buffer = plan.buffer(plan.elements, like=hidden) if apart else None

    def fold(self, i: int, states: Tensor, heads: list, kept: list[Tensor] | None = None) -> Sums:
        """Fill in the statistics of token slice i.

        Args:
            states: [t, H] operands.
            heads: What `Plan.head_tiles` gives.
            kept: Tiles [c, t] that receive exp(logit - shift), times the softcap's slope.
        """
        span = self.plan.tokens[i]
        logits = kept if self.logit_buffer is None else self.plan.tiles(self.logit_buffer, len(states))
        while True:
            if self.shifted:
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
            self.plan.logits(x, states, words, bias)
            peaks.append(x.amax(0))
        return torch.stack(peaks).amax(0)

    def sweep(self, i: int, states: Tensor, heads: list, logits: list[Tensor], kept: list[Tensor] | None) -> Sums:
        """Make each tile of a token slice and sum it up while it is hot."""
        plan, span = self.plan, self.plan.tokens[i]
        sums = Sums(plan, len(states), states)
        exps = logits if kept is None or plan.mixed else kept
        if self.exp_buffer is not None:
            exps = plan.tiles(self.exp_buffer, len(states))
        for j, ((words, bias), x, e) in enumerate(zip(heads, logits, exps, strict=True)):
            slope = plan.logits(x, states, words, bias)
            if self.shifted:
                x.sub_(self.shift[span])
            here = plan.targets_in(i, j)
            if here.start < here.stop:
                there = slice(here.start - span.start, here.stop - span.start)
                torch.index_select(x.view(-1), 0, plan.place[here], out=sums.logit[there])
                if sums.slope is not None:
                    torch.index_select(slope.view(-1), 0, plan.place[here], out=sums.slope[there])
            if plan.metrics:
                torch.amax(x, 0, out=sums.peaks[j])
            torch.exp(x, out=e)
            torch.sum(e, 0, out=sums.masses[j])
            if plan.makes_entropy:
                torch.sum(x.mul_(e), 0, out=sums.moments[j])
            if kept is not None and slope is not None:
                e.mul_(slope)
            if kept is not None and plan.mixed:
                kept[j].copy_(e)
        return sums

    def conclude(self, i: int, states: Tensor, heads: list, sums: Sums) -> None:
        """Turn a token slice's sums into its scores."""
        plan, span = self.plan, self.plan.tokens[i]
        order, column, home = plan.order[span], plan.column[span], plan.home[span]
        log_mass = self.mass[span].log()
        logps = (sums.logit - log_mass[column]).clamp_max_(0)
        self.logps[order] = logps
        if plan.makes_entropy:
            self.entropy[span] = (log_mass - sums.moments.sum(0) / self.mass[span]).clamp_min_(0)
        if plan.metrics:
            peak, first = sums.peaks.max(0)
            is_top1 = (sums.logit == peak[column]) & (first[column] == home)
            # An equal before it in its own tile leaves a word at most half of the probability.
            doubtful = (is_top1 & (logps < -0.69)).nonzero().flatten()
            for j in home[doubtful].unique().tolist():
                tied = doubtful[home[doubtful] == j]
                x = plan.buffer(len(heads[j][0]), len(tied), like=states)
                plan.logits(x, states[column[tied]], *heads[j])
                is_top1[tied] = x.argmax(0) == plan.row[span][tied]
            self.is_top1[order] = is_top1


class Gradients:
    """Gradients with respect to hidden, weight and bias, summed tile by tile; None where not needed.

    A tile here is minus the gradient of the logits but for a factor of each token. That factor is applied to the
    operand [t, H] and to the result [t, H] of the products, which are smaller than the tile.
    """

    def __init__(self, plan: Plan, inputs: tuple[Tensor, Tensor, Tensor | None], needed: tuple[bool, ...]):
        self.plan, self.inputs = plan, inputs
        hidden, weight, bias = inputs
        self.hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None
        # The first slice of tokens writes, the others add: zeros are for the case that there is none.
        make = torch.empty if plan.tokens else torch.zeros
        self.weight = make(weight.shape, dtype=plan.dtype, device=hidden.device) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=plan.dtype) if needed[2] else None

    def begin(self, i: int, states: Tensor, factor: Tensor) -> None:
        """Turn to token slice i: states [t, H], factor [t]."""
        self.i, self.factor = i, factor
        if self.weight is not None:
            self.scaled = (states * factor[:, None]).to(states.dtype)
        if self.hidden is not None:
            self.states_sum = self.plan.buffer(states.shape[1], len(states), like=states)

    def add(self, j: int, tile: Tensor, words: Tensor) -> None:
        """Add what tile [c, t] of word slice j contributes; words [c, H] are its operands."""
        span = self.plan.words[j]
        if self.weight is not None:
            multiply(tile, self.scaled, self.weight[span], add=self.i > 0)
        if self.hidden is not None:
            multiply(words.t(), tile, self.states_sum, add=j > 0)
        if self.bias is not None:
            self.bias[span].addmv_(tile.to(self.plan.dtype), self.factor)

    def end(self) -> None:
        """Close the token slice."""
        if self.hidden is not None:
            self.hidden[self.plan.tokens[self.i]] = self.states_sum.mul_(self.factor).t()

    def results(self) -> list[Tensor | None]:
        """Gradients in the inputs' dtypes."""
        sums = (self.hidden, self.weight, self.bias)
        return [None if x is None else x.to(y.dtype) for x, y in zip(sums, self.inputs, strict=True)]


class LogProbs(torch.autograd.Function):
    """Scores of which logps [T] carry a gradient; backward makes the tiles again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> tuple:
        statistics, heads = Statistics(plan, hidden), plan.head_tiles(weight, bias)
        for i, span in enumerate(plan.tokens):
            statistics.fold(i, plan.operand(hidden[span]), heads)
        ctx.plan, ctx.shifted = plan, statistics.shifted
        ctx.save_for_backward(hidden, weight, bias, statistics.logps, statistics.mass, statistics.shift)
        ctx.mark_non_differentiable(*(x for x in (statistics.entropy, statistics.is_top1) if x is not None))
        return statistics.logps, statistics.entropy, statistics.is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple:
        plan = ctx.plan
        hidden, weight, bias, logps, mass, shift = ctx.saved_tensors
        with gathered(weight, bias), torch.autocast(hidden.device.type, enabled=False):
            gradients = Gradients(plan, (hidden, weight, bias), ctx.needs_input_grad)
            heads = plan.head_tiles(weight, bias)
            buffer = plan.buffer(plan.elements, like=hidden)
            at_target = (torch.expm1(logps) * mass)[plan.order]
            factor = -plan.scale * upstream / mass
            for i, span in enumerate(plan.tokens):
                states = plan.operand(hidden[span])
                gradients.begin(i, states, factor[span])
                tiles = plan.tiles(buffer, len(states))
                for j, ((words, bias_tile), tile) in enumerate(zip(heads, tiles, strict=True)):
                    slope = plan.logits(tile, states, words, bias_tile)
                    if ctx.shifted:
                        tile.sub_(shift[span])
                    tile.exp_()
                    here = plan.targets_in(i, j)
                    if here.start < here.stop:
                        tile.view(-1).index_copy_(0, plan.place[here], at_target[here])
                    if slope is not None:
                        tile.mul_(slope)
                    gradients.add(j, tile.to(plan.operand_dtype), words)
                gradients.end()
            return *gradients.results(), None


class WeightedSum(torch.autograd.Function):
    """The scalar sum(weights * logps), whose gradient is made in the forward pass, and the scores, which carry none."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor, plan: Plan) -> tuple:
        statistics, heads = Statistics(plan, hidden), plan.head_tiles(weight, bias)
        gradients = Gradients(plan, (hidden, weight, bias), ctx.needs_input_grad)
        weights = weights.to(plan.dtype)
        height, width = plan.words[0].stop, plan.tokens[0].stop if plan.tokens else 0
        store = plan.buffer(len(weight) * width, like=hidden, dtype=plan.operand_dtype)
        for i, span in enumerate(plan.tokens):
            states = plan.operand(hidden[span])
            kept = store[: len(weight) * len(states)].view(len(weight), len(states))
            tiles = kept.split(height)
            sums = statistics.fold(i, states, heads, tiles)
            mass, order = statistics.mass[span], plan.order[span]
            # d logp / d logit is 1 - p at the target, from logp itself: as 1 minus a rounded p it would be lost.
            at_target = torch.expm1(statistics.logps[order]) * statistics.mass[order]
            if sums.slope is not None:
                at_target *= sums.slope
            place = plan.home[span] * (height * len(states)) + plan.place[span]
            kept.view(-1).index_copy_(0, place, at_target.to(kept.dtype))
            gradients.begin(i, states, -plan.scale * weights[span] / mass)
            for j, (words, _) in enumerate(heads):
                gradients.add(j, tiles[j], words)
            if plan.entropy_from_gradient:
                # The states' gradient is W[target] - sum(p W): times the states, logit[target] - sum(p logit).
                surplus = plan.scale * (states.t() * gradients.states_sum).sum(0) / mass
                statistics.entropy[span] = (-statistics.logps[span] - surplus).clamp_min_(0)
            gradients.end()
        ctx.gradients = gradients.results()
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
            if gradient is not None and (gradient.device.type != "cpu" or upstream != 1):
                gradient.mul_(upstream)
        return *gradients, None, None


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write, or add, the product a b to `out`, summed in out's dtype."""
    if a.dtype == out.dtype and add:
        out.addmm_(a, b)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def even_slices(length: int, most: int) -> list[slice]:
    """Cut 0:length into as few slices as `most` allows, about equally long and, where that is not short, aligned."""
    if length == 0:
        return []
    most = max(1, min(most, length))
    size = -(-length // -(-length // most))
    if size > 64:
        size = min(most, -(-size // 16) * 16)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


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
