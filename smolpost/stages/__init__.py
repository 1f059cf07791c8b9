"""The stage kinds: importing this package registers the library's own, in this order."""

from smolpost.stages import tasks, init, sft, preference, kto, distill, pairs, merge, mergekit, sweep, greedy  # isort: skip

__all__ = ["distill", "greedy", "init", "kto", "merge", "mergekit", "pairs", "preference", "sft", "sweep", "tasks"]
