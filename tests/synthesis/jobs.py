"""Jobs without a run: all prompts are asked one after the other, and the outcomes are a list."""

import asyncio
from collections.abc import Callable

from smolpost.synthesis.records import Outcome, Record, Reply, Request


def outcomes_of(job, **replies: Callable[[Request], Reply]) -> list[Outcome]:
    """
    Args:
        replies: Role -> reply function of its teacher.
    """
    found = []
    for prompt in job.prompts():
        records = {}
        for role in job.roles:

            async def ask(request, role=role):
                return replies[role](request)

            samples = asyncio.run(job.converse(role, prompt, ask))
            records[role] = Record(prompt.id, prompt.source, samples)
        found += job.outcomes(prompt, records)
    return found


def row(question: str, answer: str = "4", source: str = "sums", **more) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "source": source, **more}


def turns(*texts: str) -> list[dict]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def in_mixture(rows: list[dict]) -> list[tuple[str, dict]]:
    return [("mine", row) for row in rows]
