"""The head: log-probabilities of T tokens and their gradients, by tiles of several sizes and by other libraries.

python benchmarks/head.py [--quick] [--device cuda]

Every side makes the mean cross-entropy of the same tokens and its gradients with respect to hidden states and weight:
the states in bf16 on a GPU, the weight in fp32, under autocast. "smolpost" has the tile sizes of
`smolpost.objectives.tiling`, the sides beside it some multiple of them. "torch" makes all logits at once. Liger's fused
linear cross-entropy and cut cross-entropy run on a GPU where they are installed.
"""

import importlib.util
import statistics
import time

import torch
import torch.nn.functional as F
from side_by_side import alternate, keep, options, run_side, show

from smolpost.objectives import tiling
from smolpost.objectives.head import Head
from smolpost.objectives.logprobs import token_scores

CALLS, WARMUP = 5, 2
# Multiples of the elements of a tile, of the tokens whose tiles are kept, and of the bytes that are kept.
TILES = {
    "smolpost": (1, 1, 1),
    "smolpost, tiles x4": (4, 1, 1),
    "smolpost, tiles x16": (16, 1, 1),
    "smolpost, tokens x1/2": (1, 0.5, 1),
    "smolpost, tokens x2, tiles x4": (4, 2, 2),
}


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    coefficients = torch.full((len(targets),), 1 / len(targets), device=hidden.device)
    head = Head(weight, None, None, 1.0)
    return -token_scores(hidden, targets.cpu(), head, weights=coefficients).total


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)


def cut(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight.to(hidden.dtype), targets)


PEERS = {"torch": plain, "liger": liger, "cut cross-entropy": cut}
PACKAGES = {"liger": "liger_kernel", "cut cross-entropy": "cut_cross_entropy"}


def sides_on(device: str) -> list[str]:
    installed = [
        name
        for name in PEERS
        if name not in PACKAGES or (device == "cuda" and importlib.util.find_spec(PACKAGES[name]) is not None)
    ]
    return [*TILES, *installed]


def measure(name: str, case: dict) -> dict:
    device = torch.device(case["device"])
    on_gpu, loss_of = device.type == "cuda", PEERS.get(name, ours)
    if name in TILES:
        sizes = (tiling.TILE_ELEMENTS, tiling.KEPT_TOKENS, tiling.KEPT_BYTES)
        for by_device, factor in zip(sizes, TILES[name], strict=True):
            by_device[device.type] = int(by_device[device.type] * factor)
    draw = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(case["tokens"], case["hidden"], generator=draw, device=device)
    weight = torch.randn(case["vocab"], case["hidden"], generator=draw, device=device) / case["hidden"] ** 0.5
    targets = torch.randint(case["vocab"], (case["tokens"],), generator=draw, device=device)
    hidden = hidden.bfloat16() if on_gpu else hidden
    seconds = []
    for call in range(WARMUP + CALLS):
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        if on_gpu:
            torch.cuda.synchronize()
        if on_gpu and call == WARMUP:
            torch.cuda.reset_peak_memory_stats()
        held, began = torch.cuda.memory_allocated() if on_gpu else 0, time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = loss_of(h, w, targets)
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    found = {"seconds": statistics.median(seconds[WARMUP:]), "loss": float(loss), "gradient": float(w.grad.norm())}
    return found | ({"extra_gb": (torch.cuda.max_memory_allocated() - held) / 1e9} if on_gpu else {})


def main() -> None:
    arguments = options(__doc__.splitlines()[0], needs_data=False)
    sides = {name: lambda case, name=name: measure(name, case) for name in sides_on(arguments.device)}
    if run_side(sides, arguments):
        return
    shared = {"device": arguments.device, "vocab": 128256, "hidden": 2048}
    if arguments.device == "cuda":
        cases = {f"{tokens:,} tokens": shared | {"tokens": tokens} for tokens in (4096, 16384)}
    elif arguments.quick:
        arguments.repeats = 1
        cases = {"256 tokens, vocabulary 8192": shared | {"tokens": 256, "vocab": 8192, "hidden": 128}}
    else:
        cases = {"512 tokens": shared | {"tokens": 512, "hidden": 256}}
    results = []
    for name, case in cases.items():
        found = alternate(list(sides), case, arguments)
        table = [
            {
                "side": side,
                "ms": 1e3 * numbers["seconds"],
                "extra GB": numbers.get("extra_gb"),
                "loss": numbers["loss"],
                "gradient": numbers["gradient"],
            }
            for side, numbers in found.items()
        ]
        show(f"the head, forward and backward, {name}", table)
        results.append({"case": name, "settings": case, "sides": found})
    keep("head", arguments, results)


if __name__ == "__main__":
    main()
