"""A preview of a stage of synthetic data: a few rows, and what all rows would take if they were like these."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console

from smolpost.data.report import short
from smolpost.progress import duration, plural
from smolpost.report.samples import shown
from smolpost.report.show_samples import print_line, show
from smolpost.screen import Blocks
from smolpost.synthesis.provenance import ACCEPTED, status_of
from smolpost.synthesis.records import Outcome, Reply
from smolpost.synthesis.status import Prices


class RoleRun(NamedTuple):
    """How a preview asked one teacher.

    Attributes:
        seconds: From the first request to the last reply.
        concurrency: Requests that the stage keeps under way at most.
    """

    seconds: float
    concurrency: int
    prices: Prices


def show_preview(
    outcomes: Sequence[Outcome], console: Console, *, num_prompts: int, runs: Mapping[str, RoleRun]
) -> None:
    """Print a preview's outcomes, and what all prompts would take if they were like these.

    Args:
        outcomes: At least one.
        num_prompts: Of the stage.
        runs: Role -> how its teacher was asked.
    """
    for outcome in outcomes:
        show(shown(outcome), console)
    console.print()
    asked = len({record.id for outcome in outcomes for record in outcome.records.values()})
    counts = Counter(outcome.reason or status_of(outcome) for outcome in outcomes)
    stated = ", ".join(f"{number:,} {name}" for name, number in counts.most_common())
    low, likely, high = (
        share * num_prompts * len(outcomes) / asked for share in _share(counts[ACCEPTED], len(outcomes))
    )
    print_line(console, f"preview of {asked:,} of {num_prompts:,} prompts: {stated}; nothing is kept")
    table = [_estimate(role, outcomes, asked, num_prompts, run) for role, run in runs.items()]
    heads = ["all prompts", "tokens in", "tokens out", "time", "cost"]
    console.print(Blocks(heads, table))
    print_line(console, f"rows: about {likely:,.0f}, by this sample {low:,.0f} to {high:,.0f}")
    print_line(
        console,
        f"± is two standard errors of {asked:,} {plural('prompt', asked)}; preview=N asks more. Time: the first if the "
        "teacher answers as fast with all requests under way, the second at the preview's speed.",
    )


def _share(accepted: int, number: int) -> tuple[float, float, float]:
    """(low, found, high) share: Wilson's interval at two standard errors. It is not 0 wide where all are accepted."""
    share, z2 = accepted / number, 4.0
    middle = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = math.sqrt(z2 * (share * (1 - share) / number + z2 / (4 * number**2))) / (1 + z2 / number)
    return max(0.0, middle - half), share, min(1.0, middle + half)


def _estimate(role: str, outcomes: Sequence[Outcome], asked: int, num_prompts: int, run: RoleRun) -> list[str]:
    """Cells of one teacher."""
    replies: dict[str, list[Reply]] = defaultdict(list)  # of each prompt, which may have become several outcomes
    for record in (outcome.records[role] for outcome in outcomes):
        replies[record.id] += [reply for sample in record.samples for reply in sample.replies]
    tokens_in = [sum(reply.prompt_tokens or 0 for reply in of_one) for of_one in replies.values()]
    tokens_out = [sum(reply.completion_tokens or 0 for reply in of_one) for of_one in replies.values()]
    cost = run.prices.cost(num_prompts * statistics.fmean(tokens_in), num_prompts * statistics.fmean(tokens_out))
    longest = run.seconds * num_prompts / asked
    shortest = longest * min(asked, run.concurrency) / run.concurrency
    return [
        role, _times(tokens_in, num_prompts), _times(tokens_out, num_prompts),
        " to ".join(dict.fromkeys([duration(shortest), duration(longest)])),
        "no prices set" if cost is None else f"{cost:,.2f}",
    ]  # fmt: skip


def _times(numbers: Sequence[int], prompts: int) -> str:
    """Sum over all prompts by the mean of some: 1.2M ± 0.3M."""
    if not any(numbers):
        return "not counted"
    mean = statistics.fmean(numbers)
    error = 2 * statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
    return f"{_amount(mean * prompts)} ± {'?' if math.isnan(error) else _amount(error * prompts)}"


def _amount(number: float) -> str:
    return short(round(number))
