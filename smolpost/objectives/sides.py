"""Log-probabilities of the sides of preference pairs.

Shapes: `B` pairs, `S` scored tokens of a packed batch. The sides of the pairs count 0 to 2B - 1: pair 0 chosen,
pair 0 rejected, pair 1 chosen, ...
"""

import torch
from torch import Tensor


def summed_logps(token_logps: Tensor, side: Tensor, num_sides: int, *, ld_alpha: float | None = None) -> Tensor:
    """Log-probability of each side: the sum over its tokens, or with `ld_alpha` LD-DPO's weighted sum.

    In LD-DPO, arXiv:2409.06411, the tokens of a pair's longer side beyond the length of its shorter one count
    `ld_alpha` each. Length and place are counted in scored tokens.

    Args:
        token_logps: [S] nats; or policy minus reference of each token, for log-ratios free of the rounding that the
            difference of two large sums has. The tokens of one side come in their order; the sides may lie in any
            order, or mixed.
        side: [S] int64 in 0..num_sides - 1, the side of each token. A token that both sides score stands there twice.
        num_sides: 2B.
        ld_alpha: In [0, 1]; None is 1: the plain sum.
    Returns:
        [2B] fp32, differentiable; 0 for a side without tokens. Nothing waits for the device.
    Raises:
        ValueError: ld_alpha is outside [0, 1], or num_sides is odd.
    """
    if num_sides % 2:
        raise ValueError(f"num_sides={num_sides} is odd; each pair has two sides")
    if ld_alpha is not None:
        if not 0 <= ld_alpha <= 1:
            raise ValueError(f"ld_alpha={ld_alpha:g} is outside [0, 1]")
        beyond = _beyond_shorter_side(side, num_sides)
        token_logps = torch.where(beyond, ld_alpha * token_logps, token_logps)
    # One fp32 sum over a side of 100k tokens can be off by a nat; Apple's GPUs have no fp64.
    wide = torch.float32 if token_logps.device.type == "mps" else torch.float64
    sums = torch.zeros(num_sides, dtype=wide, device=token_logps.device)
    return sums.index_add(0, side, token_logps.to(wide)).float()


def _beyond_shorter_side(side: Tensor, num_sides: int) -> Tensor:
    """[S] whether the token comes after as many tokens of its side as the pair's shorter side has."""
    counts = torch.zeros(num_sides, dtype=torch.int64, device=side.device).index_add(0, side, torch.ones_like(side))
    shorter = counts.view(-1, 2).amin(dim=1)
    order = side.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(side)
    place[order] = torch.arange(len(side), device=side.device) - starts[side[order]]
    return place >= shorter[side // 2]
