"""The stage kinds: importing this package registers the library's own."""

from smolpost.stages import greedy, init, merge, mergekit, pairs, preference, sft, sweep, tasks

__all__ = ["greedy", "init", "merge", "mergekit", "pairs", "preference", "sft", "sweep", "tasks"]
