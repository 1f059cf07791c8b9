"""The kinds of task that the library measures; importing this package registers them."""

from smolpost.evaluation.tasks import instructions, perplexity, preference, reasoning, recall, ruler, tool_calls

__all__ = ["instructions", "perplexity", "preference", "reasoning", "recall", "ruler", "tool_calls"]
