"""Preference losses, and the log-probabilities they compare.

Shapes: `B` pairs, `S` scored tokens of a packed batch. The sides of the pairs count 0 to 2B - 1: pair 0 chosen,
pair 0 rejected, pair 1 chosen, ... A side's log-ratio is its log-probability under the policy minus that under the
reference, both summed over the side's scored tokens, nats. Every loss takes log-ratios [B] and gives one value per
pair; names, values and gradients are those of TRL's DPOTrainer.
"""

import torch
import torch.nn.functional as F
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


def preference_loss(
    name: str,
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    num_chosen: Tensor,
    num_rejected: Tensor,
) -> Tensor:
    """The loss of each pair under one of `LOSSES`.

    Args:
        name: A key of `LOSSES`.
        chosen_logratios, rejected_logratios: [B] nats.
        beta: Scale on the log-ratios, per nat; > 0. Of ipo it is the paper's tau.
        label_smoothing: Share of pairs whose two sides are swapped, in [0, 0.5); robust alone uses it.
        num_chosen, num_rejected: [B] scored tokens of each side; ipo alone uses them.
    Returns:
        [B]
    Raises:
        ValueError: Unknown name; beta or label_smoothing out of range, or smoothing that the loss would ignore; the
            shapes differ.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown preference loss {name!r}; choose one of {', '.join(LOSSES)}")
    if not beta > 0:
        raise ValueError(f"beta={beta:g} is not above 0")
    if label_smoothing and name != "robust":
        raise ValueError(f"label_smoothing={label_smoothing:g} has no part in {name}; set it to 0 or choose robust")
    if chosen_logratios.shape != rejected_logratios.shape:
        raise ValueError(
            f"shapes differ: {tuple(chosen_logratios.shape)} chosen and {tuple(rejected_logratios.shape)} rejected"
        )
    own = {
        "ipo": {"num_chosen": num_chosen, "num_rejected": num_rejected},
        "robust": {"label_smoothing": label_smoothing},
    }
    return LOSSES[name](chosen_logratios, rejected_logratios, beta=beta, **own.get(name, {}))


def apo_zero_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Raise chosen and lower rejected likelihood, each against the reference.

    Eq. 7 of arXiv:2408.06266: 1 - sigmoid(beta r_chosen) + sigmoid(beta r_rejected).

    Returns:
        [B], each in (0, 2); exactly 1 where policy equals reference.
    """
    return torch.sigmoid(-beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


def apo_down_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Lower both likelihoods, rejected more: for chosen sides that are worse than what the policy writes itself.

    Eq. 8 of arXiv:2408.06266: sigmoid(beta r_chosen) + 1 - sigmoid(beta (r_chosen - r_rejected)).

    Returns:
        [B], each in (0, 2); exactly 1 where policy equals reference.
    """
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-beta * (chosen_logratios - rejected_logratios))


def sigmoid_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Raise chosen likelihood against rejected: DPO.

    Eq. 7 of arXiv:2305.18290: -log sigmoid(beta (r_chosen - r_rejected)).

    Returns:
        [B], each above 0; ln 2 where policy equals reference.
    """
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


def robust_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO's loss on the true preferences, estimated without bias from pairs of which some are swapped.

    Section 3.1 of arXiv:2403.00409: ((1 - e) DPO(pair) - e DPO(swapped pair)) / (1 - 2 e), e the share of swapped
    pairs. With e > 0 it has no lower bound: it falls by e / (1 - 2 e) per unit of a large margin.

    Args:
        label_smoothing: e, in [0, 0.5); 0 is `sigmoid_loss`.
    Returns:
        [B], any real; ln 2 where policy equals reference.
    Raises:
        ValueError: label_smoothing is outside [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing:g} is outside [0, 0.5)")
    as_labelled = sigmoid_loss(chosen_logratios, rejected_logratios, beta=beta)
    swapped = sigmoid_loss(rejected_logratios, chosen_logratios, beta=beta)
    return ((1 - label_smoothing) * as_labelled - label_smoothing * swapped) / (1 - 2 * label_smoothing)


def ipo_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, num_chosen: Tensor, num_rejected: Tensor
) -> Tensor:
    """Bring the margin of the two mean log-ratios per token to 1 / (2 beta), and no further.

    Eq. 17 of arXiv:2310.12036 with tau = beta, on log-ratios per token instead of per side, as in TRL.

    Args:
        beta: The smaller, the wider the margin; tokens per nat, as the margin is in nats per token.
        num_chosen, num_rejected: [B] scored tokens of each side.
    Returns:
        [B], each at least 0; 1 / (2 beta)^2 where policy equals reference.
    """
    margin = chosen_logratios / num_chosen.clamp(min=1) - rejected_logratios / num_rejected.clamp(min=1)
    return (margin - 1 / (2 * beta)) ** 2


LOSSES = {
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "robust": robust_loss,
}
