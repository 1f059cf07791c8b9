"""The weighted mean of tensors: products and sums in fp32, one rounding to the output dtype."""

from collections.abc import Sequence

import torch


class Mean:
    """Computes weighted means into buffers that it keeps, so that a long pass allocates nothing; one per thread.

    Args:
        weights: One per input, as given: not normalised. A weight counts as its nearest fp32 value.
        dtype: Of the result: torch.float32, torch.bfloat16 or torch.float16.
        size: Most elements of one call.
    """

    def __init__(self, weights: Sequence[float], dtype: torch.dtype, size: int):
        self.weights = tuple(weights)
        self._sum, self._term = torch.empty(size), torch.empty(size)
        self._out = self._sum if dtype == torch.float32 else torch.empty(size, dtype=dtype)

    def __call__(self, chunks: Sequence[torch.Tensor]) -> torch.Tensor:
        """sum(weight * chunk) over the inputs in their order.

        Args:
            chunks: [n] per input, 0 < n <= size, contiguous; fp32, bf16 or fp16.
        Returns:
            [n], a view that the next call overwrites.
        Raises:
            ValueError: The number of chunks is not that of the weights, or their lengths differ.
        """
        number = chunks[0].numel() if chunks else 0
        if len(chunks) != len(self.weights) or any(chunk.shape != (number,) for chunk in chunks):
            shapes = [tuple(chunk.shape) for chunk in chunks]
            raise ValueError(f"{len(self.weights)} weights need as many chunks of one length, not {shapes}")
        total, term, out = self._sum[:number], self._term[:number], self._out[:number]
        for index, (chunk, weight) in enumerate(zip(chunks, self.weights, strict=True)):
            # bf16 times a number would be rounded to bf16.
            values = chunk if chunk.dtype == torch.float32 else term.copy_(chunk)
            if index:
                # Product and sum are rounded as one, in the inputs' order: bit for bit what mergekit computes.
                total.add_(values, alpha=weight)
            else:
                torch.mul(values, weight, out=total)
        return out if out.dtype == torch.float32 else out.copy_(total)


def is_finite(values: torch.Tensor) -> bool:
    """Whether no element of a non-empty tensor is NaN or infinite."""
    # aminmax passes NaN on and is an order of magnitude faster than isfinite.
    low, high = values.aminmax()
    return bool(low.isfinite() & high.isfinite())
