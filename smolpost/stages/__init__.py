"""The stage kinds: importing this package registers the library's own, in this order."""

from smolpost.stages import (  # isort: skip
    tasks, init, released, sft, preference, kto, distill, grpo,
    gsm8k, pairs, reasoning_traces,
    merge, mergekit, sweep, greedy,
)  # fmt: skip

__all__ = [
    "distill", "greedy", "grpo", "gsm8k", "init", "kto", "merge", "mergekit", "pairs", "preference",
    "reasoning_traces", "released", "sft", "sweep", "tasks",
]  # fmt: skip
