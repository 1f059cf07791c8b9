"""The elementwise work of a decoder layer as pure tensor functions, each of them one kernel where they are compiled.

Run one operation at a time, they take a third of a training step on a GPU: every operation reads and writes all
hidden states, and many keep a copy for the backward pass. `torch.compile` makes one pass over memory of each function,
and keeps only inputs and outputs for backward. Whole layers are not compiled: attention takes the documents of a pack
as Python numbers, and each new packing would compile again.

`SMOLPOST_COMPILE=0` switches compilation off, `SMOLPOST_COMPILE=1` switches it on for every device.

Shapes: B rows, L tokens per row, H hidden, N query heads, K key/value heads, D head size, I hidden size of the MLP.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache, wraps

import torch
import torch.nn.functional as F


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that linear layers compute in on the tensor's device; None outside of autocast."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _double(x: torch.Tensor) -> torch.Tensor:
    return x + x


@cache
def _compiler_works(device: str) -> bool:
    """Compile something small: Triton may be missing, too old for the card, or without a C compiler."""
    try:
        torch.compile(_double)(torch.ones(2, device=device))
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(
            f"torch.compile does not work on this {device} device, so training runs slower and takes more memory: "
            f"{reason}; install the triton that belongs to torch {torch.__version__} and a C compiler, or set "
            "SMOLPOST_COMPILE=0 to silence this",
            stacklevel=2,
        )
        return False
    return True


def compiles(device: str) -> bool:
    """Whether training on this type of device runs the functions compiled."""
    switch = os.environ.get("SMOLPOST_COMPILE", "")
    if switch == "0" or (device != "cuda" and switch != "1") or device == "meta":
        return False
    return _compiler_works(device)


def _is_compiled(tensor: torch.Tensor) -> bool:
    """Whether functions of this tensor run compiled: in training and in passes under autocast.

    Plain generation is left out: its many shapes of few tokens would be compiled for little.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    device = tensor.device.type
    return (torch.is_grad_enabled() or torch.is_autocast_enabled(device)) and compiles(device)


def _fused(function: Callable) -> Callable:
    """Compile a function of tensors [rows, ..., tokens, features] for any numbers of rows and tokens."""
    compiled = cache(lambda: torch.compile(function))  # the compiler's own import takes a second

    @wraps(function)
    def run(*inputs):
        if not _is_compiled(inputs[0]):
            return function(*inputs)
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.ndim > 1:
                # Sizes of features stay constants, which make faster kernels.
                torch._dynamo.maybe_mark_dynamic(x, [0, x.ndim - 2])
        return compiled()(*inputs)

    return run


@_fused
def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None) -> torch.Tensor:
    """Scale each vector to unit root mean square, then by a learned weight (arXiv:1910.07467).

    Args:
        hidden: [B, L, H].
        weight: [H].
        eps: Added to the mean square.
        dtype: The result's dtype; None takes the dtype that hidden and weight promote to.
    Returns:
        [B, L, H].
    """
    return _normalized(hidden, weight, eps, dtype)


@_fused
def add_rms_norm(
    residual: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add an update [B, L, H] to the residual stream [B, L, H] -> the sum and its `rms_norm`, each [B, L, H]."""
    total = residual + update
    return total, _normalized(total, weight, eps, dtype)


def _normalized(hidden: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None) -> torch.Tensor:
    # Squares overflow fp16 and lose their tail in bf16, so the norm itself is fp32; the weight is applied after the
    # cast, as the released checkpoints were trained.
    x = hidden.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = weight * x.to(hidden.dtype)
    return x if dtype is None else x.to(dtype)


@_fused
def rope(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the pairs (x[i], x[i + D/2]) of queries and keys (arXiv:2104.09864).

    Args:
        query: [B, N, L, D].
        key: [B, K, L, D].
        cos: Cosines of the angles, [B or 1, L, D].
        sin: Sines of the angles, [B or 1, L, D].
        dtype: Of the results; None: what query and cosines promote to, which is what they are computed in.
    Returns:
        Query and key, in the shapes given.
    """
    return _rotated(query, cos, sin, dtype), _rotated(key, cos, sin, dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    x = x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return x if dtype is None else x.to(dtype)


@_fused
def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, all [B, L, I] (arXiv:2002.05202)."""
    return F.silu(gate) * up
