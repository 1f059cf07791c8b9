"""Prompts of rows, answered in think mode: reasoning data for domains that have none."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

from smolpost.synthesis.filters import first_fault, judge_sample
from smolpost.synthesis.jobs.asking import Asker, has_answer, mode_of_replies, row_of
from smolpost.synthesis.jobs.complement import Complement
from smolpost.synthesis.jobs.prompts import (
    asks_nothing,
    conversation_of,
    has_tool_turns,
    mode_of,
    question_of,
)
from smolpost.synthesis.records import Ask, Job, Outcome, Prompt, Record, Sample
from smolpost.synthesis.settings import Filters, Teacher


class Settings(Protocol):
    """What is read of a stage; `stages.reasoning_traces` says what each field means."""

    teacher: Teacher
    turns: str
    suffix: str
    filters: Filters
    seed: int


class ReasoningTraces(Job):
    """
    Args:
        rows: (name of the source, row) of the prompts mixture.
        complete: Sources that are left out, as they have rows of the asked mode already.
    """

    def __init__(self, settings: Settings, rows: Iterable[tuple[str, dict[str, Any]]], complete: Collection[str] = ()):
        self.settings, self.left = settings, Complement(rows, complete)
        self.asker = Asker("teacher", settings.teacher, settings.seed)

    def prompts(self) -> Iterator[Prompt]:
        return iter(self.left)

    async def converse(self, role: str, prompt: Prompt, ask: Ask) -> list[Sample]:
        if self._cannot_ask(prompt):
            return []
        thinking = mode_of(prompt.row, self.settings.teacher.thinking)
        if self.settings.turns == "last":
            messages = question_of(prompt.row)
            reply = await ask(self.asker.request(prompt, messages, thinking))
            return [Sample([*messages, self.asker.turn(reply)], [reply])]
        return [await self._every_turn(prompt, thinking, ask)]

    async def _every_turn(self, prompt: Prompt, thinking: bool | None, ask: Ask) -> Sample:
        """Each assistant turn after the first user turn is asked for in order, up to a reply without an answer."""
        messages, replies = [], []
        turns = conversation_of(prompt.row)
        if turns[-1]["role"] == "user":
            turns = [*turns, {"role": "assistant"}]
        for turn in turns:
            if turn["role"] != "assistant" or asks_nothing(messages):
                messages.append(turn)
                continue
            reply = await ask(self.asker.request(prompt, messages, thinking, turn=len(replies)))
            messages.append(self.asker.turn(reply))
            replies.append(reply)
            if not has_answer(reply):
                break
        return Sample(messages, replies)

    def _cannot_ask(self, prompt: Prompt) -> str:
        """Why a row cannot be asked about, as it is counted in reports; "" where it can."""
        if asks_nothing(question_of(prompt.row)):
            return "no_user_turn"
        if self.asker.cannot_ask(prompt.row):
            return "template_tools"
        # The results in the row answer other calls than those that the teacher would make.
        return "tool_turns" if self.settings.turns == "every" and has_tool_turns(prompt.row) else ""

    def outcomes(self, prompt: Prompt, records: Mapping[str, Record]) -> list[Outcome]:
        if reason := self._cannot_ask(prompt):
            return [Outcome(prompt, None, reason, records=records)]
        thinking = mode_of(prompt.row, self.settings.teacher.thinking)
        [sample] = records["teacher"].samples
        verdicts = judge_sample(sample, prompt, self.settings.filters, thinking=thinking)
        reason = first_fault(verdicts)
        if not reason and not has_answer(sample.replies[-1]):
            reason = "unanswered"
        mode = mode_of_replies(thinking, self.settings.teacher, sample.replies)
        row = None if reason else row_of(prompt, mode, self.settings.suffix, {"messages": sample.messages})
        return [Outcome(prompt, row, reason, verdicts=verdicts, records=records)]

    def report(self) -> dict[str, Any]:
        return self.left.report()

    def lines(self) -> list[str]:
        return self.left.lines()
