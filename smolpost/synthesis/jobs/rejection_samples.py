"""Several replies to each prompt, of which those stay that pass all filters, the right answer among them."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from smolpost.inference.seeds import derive_seed
from smolpost.synthesis.filters import first_fault, judge_sample
from smolpost.synthesis.filters.form import tokens_of
from smolpost.synthesis.jobs.asking import Asker, mode_of_replies, row_of
from smolpost.synthesis.jobs.prompts import asks_nothing, mode_of, numbered, prompts_of, question_of
from smolpost.synthesis.records import Ask, Job, Outcome, Prompt, Record, Sample, Verdict
from smolpost.synthesis.settings import Filters, Teacher


class Settings(Protocol):
    """What is read of a stage; `stages.rejection_samples` says what each field means."""

    teacher: Teacher
    num_samples: int
    keep: str
    suffix: str
    filters: Filters
    seed: int


class Judged(NamedTuple):
    """A sample and what the filters say of it; the reason is "" where it passes all."""

    sample: Sample
    verdicts: dict[str, Verdict]
    reason: str


class PassCounts(NamedTuple):
    """Of one source: prompts, samples that pass, and prompts with one that passes."""

    prompts: int = 0
    passed: int = 0
    solved: int = 0


class RejectionSamples(Job):
    """
    Args:
        rows: (name of the source, row) of the prompts mixture.
    """

    def __init__(self, settings: Settings, rows: Iterable[tuple[str, dict[str, Any]]]):
        self.settings, self.rows = settings, rows
        self.rows_per_prompt = settings.num_samples if settings.keep == "all_right" else 1
        self.asker = Asker("teacher", settings.teacher, settings.seed)
        self.counts: dict[str, PassCounts] = defaultdict(PassCounts)

    def prompts(self) -> Iterator[Prompt]:
        return prompts_of(self.rows)

    async def converse(self, role: str, prompt: Prompt, ask: Ask) -> list[Sample]:
        """The samples are separate requests with seeds of their own, asked at once."""
        if self._cannot_ask(prompt):
            return []
        messages, thinking = question_of(prompt.row), mode_of(prompt.row, self.settings.teacher.thinking)
        requests = [
            self.asker.request(prompt, messages, thinking, turn=f"sample {number}")
            for number in range(self.settings.num_samples)
        ]
        replies = await asyncio.gather(*map(ask, requests), return_exceptions=True)
        for error in replies:
            if isinstance(error, BaseException):
                raise error
        return [Sample([*messages, self.asker.turn(reply)], [reply]) for reply in replies]

    def _cannot_ask(self, prompt: Prompt) -> str:
        if asks_nothing(question_of(prompt.row)):
            return "no_user_turn"
        return "template_tools" if self.asker.cannot_ask(prompt.row) else ""

    def outcomes(self, prompt: Prompt, records: Mapping[str, Record]) -> list[Outcome]:
        prompts = numbered(prompt, self.rows_per_prompt)
        if reason := self._cannot_ask(prompt):
            return [Outcome(part, None, reason, records=records) for part in prompts]
        judged = [self._judged(sample, prompt) for sample in records["teacher"].samples]
        right = [found for found in judged if not found.reason]
        so_far = self.counts[prompt.source]
        self.counts[prompt.source] = PassCounts(
            so_far.prompts + 1, so_far.passed + len(right), so_far.solved + bool(right)
        )
        if self.settings.keep == "all_right":
            return [
                self._outcome(part, found, records | {"teacher": records["teacher"]._replace(samples=[found.sample])})
                for part, found in zip(prompts, judged, strict=True)
            ]
        if not right:
            return [Outcome(prompt, None, "none_right", verdicts=judged[0].verdicts, records=records)]
        return [self._outcome(prompt, self._picked(right, prompt), records)]

    def _judged(self, sample: Sample, prompt: Prompt) -> Judged:
        thinking = mode_of(prompt.row, self.settings.teacher.thinking)
        verdicts = judge_sample(sample, prompt, self.settings.filters, thinking=thinking)
        return Judged(sample, verdicts, first_fault(verdicts))

    def _picked(self, right: list[Judged], prompt: Prompt) -> Judged:
        """One of the samples that pass."""
        if self.settings.keep == "shortest_right":
            return min(right, key=lambda found: tokens_of(found.sample.replies[-1]))
        if self.settings.keep == "random_right":
            return random.Random(derive_seed(self.settings.seed, "pick", prompt.id)).choice(right)
        return right[0]

    def _outcome(self, prompt: Prompt, found: Judged, records: Mapping[str, Record]) -> Outcome:
        thinking = mode_of(prompt.row, self.settings.teacher.thinking)
        mode = mode_of_replies(thinking, self.settings.teacher, found.sample.replies)
        row = row_of(prompt, mode, self.settings.suffix, {"messages": found.sample.messages})
        return Outcome(prompt, None if found.reason else row, found.reason, verdicts=found.verdicts, records=records)

    def report(self) -> dict[str, Any]:
        """pass@1 is the mean share of samples that pass; pass@n the share of prompts with one that does."""
        number = self.settings.num_samples
        return {
            "num_samples": number,
            "pass": {
                source: {
                    "prompts": found.prompts,
                    "pass@1": found.passed / (found.prompts * number),
                    f"pass@{number}": found.solved / found.prompts,
                }
                for source, found in self.counts.items()
            },
        }

    def lines(self) -> list[str]:
        return [
            f"{source}: " + ", ".join(f"{name} {found[name]:.1%}" for name in found if name != "prompts")
            for source, found in self.report()["pass"].items()
        ]
