"""How the logits of T tokens over V words are cut into tiles, and with which arithmetic each tile is made.

T tokens, V words of the vocabulary, H hidden, t tokens and c words of a tile. Tiles are stored [c, t]: with tokens
innermost, all three matrix products read and write them as they lie.
"""

import torch
from torch import Tensor

from smolpost.objectives.head import Head
from smolpost.objectives.transfer import to_device

# Measured on CPUs with 2 MiB of L2 cache per core; the GPU's are reckoned from its bandwidth, not measured.
TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # of a tile that is to stay in cache (per core), or to fill a GPU
TILE_TOKENS = {"cpu": 512, "cuda": 4096}  # beyond these, rereading the weight no longer counts
KEPT_TOKENS = {"cpu": 256, "cuda": 4096}  # the same where the tokens' tiles are kept until the vocabulary is done
KEPT_BYTES = {"cpu": 2**27, "cuda": 2**30}  # of the tiles kept

BF16_INTO_FP32 = ("cuda",)  # devices whose matrix products read bf16 and write fp32
READ_WITHOUT_WAITING = ("cpu",)  # devices whose numbers Python can look at without stopping them


class Tiling:
    """What the two directions of a call share: the cut into tiles, where targets lie in them, and the arithmetic.

    Attributes:
        tokens, words: Slices of the T tokens and of the V words; all but the last are of one length.
        elements: Elements of the largest tile.
        dtype: Of statistics and gradients.
        operand_dtype: Of what the matrix products read.
        kept: Whether a token's tiles are kept until the whole vocabulary is seen, then made its gradient.
        entropy_from_gradient: Whether the entropy falls out of the gradient, or needs sums of its own.
        unread: Whether Python decides nothing by the numbers, as it would have to wait for them.
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
        self.unread = device not in READ_WITHOUT_WAITING
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
        self.locate(targets, width, self.words[0].stop, hidden.device)

    @property
    def makes_entropy(self) -> bool:
        return self.metrics and not self.entropy_from_gradient

    def locate(self, targets: Tensor, width: int, height: int, device: torch.device) -> None:
        """Sort the targets by tile, once, so that no tile has to search for its own."""
        token = torch.arange(len(targets), device=targets.device)
        first = token // width * width
        tile = first // width * len(self.words) + targets // height
        order = tile.argsort()
        home, row, column = (x[order] for x in (targets // height, targets % height, token - first))
        place = row * (len(targets) - first).clamp_max(width)[order] + column
        found = to_device(torch.stack((order, home, row, column, place)), device)
        self.order, self.home, self.row, self.column, self.place = found
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
