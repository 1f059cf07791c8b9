"""The stage kinds: importing this package registers the library's own, in this order."""

from smolpost.stages import tasks, init, sft, preference, pairs, merge, mergekit, sweep, greedy, released  # isort: skip

__all__ = ["greedy", "init", "merge", "mergekit", "pairs", "preference", "released", "sft", "sweep", "tasks"]
