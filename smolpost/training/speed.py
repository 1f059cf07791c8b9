"""The speed of a training between two of its log lines, and over all of them."""

import resource
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from smolpost.training.batches import GlobalBatches


@dataclass
class Meter:
    """Measures from log line to log line, where the loss has been read and so the device has nothing left to do.

    The first line of a process only starts the clock, so loading, compiling and the first step are not measured.

    Attributes:
        batches: Say which rows an optimizer step takes.
        num_devices: That share the work.
        device: This rank's.
        row_flops: [N] needed floating-point operations of each row, or None where they are not known.
        matmul_tflops: What the device does when it only multiplies matrices, or None.
        seconds, steps, tokens, flops: Measured so far; tokens are those read, padding included.
    """

    batches: GlobalBatches
    num_devices: int
    device: torch.device
    row_flops: np.ndarray | None = None
    matmul_tflops: float | None = None
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    _last: tuple[float, int, int] | None = None
    _epoch_flops: dict[int, np.ndarray] = field(default_factory=dict)

    def read(self, step: int, tokens: int) -> dict[str, float]:
        """What a log line says of the time since the last one.

        Args:
            step: Optimizer steps done.
            tokens: Read in all of them.
        """
        now, last = (time.perf_counter(), step, tokens), self._last
        self._last = now
        if last is None or step == last[1]:
            return self.peak()
        seconds, flops = now[0] - last[0], self.flops_of(range(last[1], step))
        self.seconds += seconds
        self.steps += step - last[1]
        self.tokens += tokens - last[2]
        self.flops += flops
        return self._rates(seconds, tokens - last[2], flops) | self.peak()

    def summary(self) -> dict[str, float]:
        """The same of all time measured; without speeds where there was a single log line."""
        return (self._rates(self.seconds, self.tokens, self.flops) if self.steps else {}) | self.peak()

    def _rates(self, seconds: float, tokens: int, flops: float) -> dict[str, float]:
        found = {"tokens_per_second": tokens / seconds}
        if flops:
            found["tflops"] = flops / seconds / self.num_devices / 1e12
        if flops and self.matmul_tflops:
            found["matmul_share"] = found["tflops"] / self.matmul_tflops
        return found

    def peak(self) -> dict[str, float]:
        """Most memory that the device has held, in GB: tensors of a GPU, the process itself on a CPU."""
        if self.device.type == "cuda":
            return {"peak_gb": torch.cuda.max_memory_allocated(self.device) / 1e9}
        if self.device.type == "cpu":
            unit = 1 if sys.platform == "darwin" else 1024
            return {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
        return {}

    def flops_of(self, steps: range) -> float:
        """Needed operations of these optimizer steps, on all devices; 0 where they are not known."""
        if self.row_flops is None:
            return 0.0
        per_epoch = len(self.batches)
        return float(sum(self._flops_in(step // per_epoch)[step % per_epoch] for step in steps))

    def _flops_in(self, epoch: int) -> np.ndarray:
        """[steps] needed operations of each step of an epoch; those of the last one asked for are kept."""
        if epoch not in self._epoch_flops:
            ordered = self.row_flops[self.batches.order(epoch)]
            firsts = np.arange(0, len(ordered), self.batches.global_batch_size)
            self._epoch_flops = {epoch: np.add.reduceat(ordered, firsts)}
        return self._epoch_flops[epoch]
