"""Which FlashAttention runs a packed row on a CUDA device, and why none does.

T tokens of a row, N query heads, K key heads (N a multiple of K), D head size.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn


class VarlenKernel(NamedTuple):
    """FlashAttention on sequences of unequal length, causal, the last query of each aligned with its last key.

    Attributes:
        name: A word for logs.
        run: Takes query [T, N, D], key and value [keys, K, D], ends of the sequences' queries and of their keys (int32,
            from 0), most queries, most keys, `scale` and `window_size` (number of keys before a query's own and 0
            after; -1 is all) -> [T, N, D].
        takes_windows: Whether a window may be other than (-1, 0).
    """

    name: str
    run: Callable
    takes_windows: bool = True


def _flash_attention_3() -> VarlenKernel | None:
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except (ImportError, OSError):  # OSError: built for another CUDA
        return None

    def run(*args, scale, window_size):
        found = flash_attn_varlen_func(*args, softmax_scale=scale, causal=True, window_size=window_size)
        return found[0] if isinstance(found, tuple) else found  # early releases add the log-sum-exps

    return VarlenKernel("flash-attention-3", run)


def _torch_varlen() -> VarlenKernel:
    known = inspect.signature(varlen_attn).parameters
    # Before torch 2.13 fewer key heads than query heads need no permission.
    fixed = {"enable_gqa": True} if "enable_gqa" in known else {}
    takes_windows = "window_size" in known
    if not takes_windows:
        fixed["is_causal"] = True

    def run(query, *args, scale, window_size):
        options = dict(fixed)
        if takes_windows:
            options["window_size"] = window_size
        if "scale" in known:
            options["scale"] = scale
        elif scale is not None and scale != query.shape[-1] ** -0.5:
            query = query * (scale * query.shape[-1] ** 0.5)
        return varlen_attn(query, *args, **options)

    return VarlenKernel("torch-varlen", run, takes_windows)


def _flash_attention_2() -> VarlenKernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError):
        return None
    return VarlenKernel(
        "flash-attention-2",
        lambda *args, scale, window_size: flash_attn_varlen_func(
            *args, softmax_scale=scale, causal=True, window_size=window_size
        ),
    )


@cache
def _fastest(capability: tuple[int, int], windowed: bool) -> VarlenKernel | None:
    """The fastest kernel installed for a card of this compute capability."""
    makers = (_torch_varlen, _flash_attention_2)
    if capability == (9, 0):
        makers = (_flash_attention_3, *makers)
    for make in makers:
        kernel = make()
        if kernel is not None and (kernel.takes_windows or not windowed):
            return kernel
    return None


def choose(query: torch.Tensor, value: torch.Tensor, window: int | None, dropout: float) -> VarlenKernel | str:
    """The kernel for query [1, N, T, D] and value [1, K, T, D] on their CUDA device, or the reason why none runs."""
    size, capability = query.shape[3], torch.cuda.get_device_capability(query.device)
    if query.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(query.dtype).removeprefix("torch.")
        return f"FlashAttention takes bf16 and fp16, and this model computes in {dtype}; set precision=bf16"
    if capability < (8, 0):
        major, minor = capability
        return f"FlashAttention needs compute capability 8.0, and this card has {major}.{minor}; use an A100 or newer"
    if dropout:
        return (
            f"FlashAttention runs without dropout here, and attention_dropout is {dropout}; set it to 0 in config.json"
        )
    # The backward of heads larger than 192 does not run on every GPU.
    if size % 8 or size > 192 or value.shape[3] != size:
        return (
            "FlashAttention takes heads of one size for queries and values, a multiple of 8 up to 192, and this "
            f"model's have {size} and {value.shape[3]}; no setting changes that"
        )
    return _fastest(capability, window is not None) or (
        f"varlen_attn of torch {torch.__version__} takes no sliding window, and this model has one of {window}; "
        "install torch>=2.11 or flash-attn"
    )


@cache
def report(reason: str) -> None:
    """Say once why packed rows are slow."""
    warnings.warn(f"packed attention runs document by document, which is slower: {reason}", stacklevel=2)
