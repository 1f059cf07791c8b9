"""The stage kinds: importing this package registers the library's own, in this order."""

from smolpost.stages import (  # isort: skip
    tasks, practice, gsm8k, init, released, sft, preference, kto, distill, grpo, merge, mergekit, sweep, greedy,
    pairs, reasoning_traces, rejection_samples, judge, everyday_conversations, mode_switch,
)  # fmt: skip

__all__ = [
    "distill", "everyday_conversations", "greedy", "grpo", "gsm8k", "init", "judge", "kto", "merge", "mergekit",
    "mode_switch", "pairs", "practice", "preference", "reasoning_traces", "rejection_samples", "released",
    "sft", "sweep", "tasks",
]  # fmt: skip
