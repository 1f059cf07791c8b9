"""Rows scored by a judge: a pair stays where the judge prefers its chosen side by a margin, a reply where it is good.

The judge sees both orders of a pair, as judges prefer a reply for its place (arXiv:2306.05685, section 3.3).
"""

import asyncio
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from smolpost.chat.reasoning import split_reasoning
from smolpost.chat.render import text_of
from smolpost.data.prompts import mode_of, split_last_reply
from smolpost.synthesis.filters import first_fault
from smolpost.synthesis.filters.form import PASSED
from smolpost.synthesis.filters.sides import margin
from smolpost.synthesis.jobs.asking import Asker, instructed, row_of
from smolpost.synthesis.jobs.prompts import prompts_of
from smolpost.synthesis.records import Ask, Job, Message, Outcome, Prompt, Record, Reply, Sample, Verdict
from smolpost.synthesis.settings import Teacher

LEAST, MOST = 1, 10  # scores
SIDES = ("chosen", "rejected")
ORDERS = (SIDES, SIDES[::-1])

PAIR = """You compare two replies to the last message of a conversation. {criteria}

{conversation}

[Reply A]
{a}

[Reply B]
{b}

Score each reply from {least} (useless) to {most} (could not be better). Do not let the order or the length of the \
replies count. You may explain yourself first. Your last line has to be the scores and nothing else, in this \
form, with numbers for SCORE:
A: SCORE, B: SCORE"""
SINGLE = """You score the reply to the last message of a conversation. {criteria}

{conversation}

[Reply A]
{a}

Score the reply from {least} (useless) to {most} (could not be better). Do not let its length count. You may explain \
yourself first. Your last line has to be the score and nothing else, in this form, with a number for SCORE:
A: SCORE"""
_SCORE = r"([0-9]{1,2}(?:\.[0-9]{1,2})?)"
_LINES = {1: re.compile(rf"A:\s*{_SCORE}"), 2: re.compile(rf"A:\s*{_SCORE}\s*[,;]?\s*B:\s*{_SCORE}")}


class Settings(Protocol):
    """What is read of a stage; `stages.judge` says what each field means."""

    teacher: Teacher
    criteria: str
    min_margin: float
    min_score: float
    seed: int


class Judge(Job):
    """
    Args:
        rows: (name of the source, row): preference pairs, or conversations whose last reply is scored.
    """

    def __init__(self, settings: Settings, rows: Iterable[tuple[str, dict[str, Any]]]):
        self.settings, self.rows = settings, rows
        self.asker = Asker("teacher", settings.teacher, settings.seed)
        self.counts: Counter[str] = Counter()

    def prompts(self) -> Iterator[Prompt]:
        return prompts_of(self.rows)

    async def converse(self, role: str, prompt: Prompt, ask: Ask) -> list[Sample]:
        """A pair is asked about in both orders at once, each with a seed of its own."""
        requests = []
        for number, text in enumerate(self._questions(prompt.row)):
            alone = prompt._replace(row={})  # neither its tools nor its instructions are the judge's
            question = [{"role": "user", "content": text}]
            requests.append(self.asker.request(alone, question, bool(self.settings.teacher.thinking), turn=number))
        replies = await asyncio.gather(*map(ask, requests), return_exceptions=True)
        for error in replies:
            if isinstance(error, BaseException):
                raise error
        return [
            Sample([*request.messages, self.asker.turn(reply)], [reply])
            for request, reply in zip(requests, replies, strict=True)
        ]

    def _questions(self, row: dict[str, Any]) -> list[str]:
        shared = {"criteria": self.settings.criteria, "least": LEAST, "most": MOST}
        if not _is_pair(row):
            before, _ = split_last_reply(row["messages"])
            return [
                SINGLE.format(**shared, conversation=_shown(before, row), a=_answer(row["messages"][len(before) :]))
            ]
        before = _shared_turns(row)
        answers = {side: _answer(row[side][len(before) :]) for side in SIDES}
        return [
            PAIR.format(**shared, conversation=_shown(before, row), a=answers[first], b=answers[second])
            for first, second in ORDERS
        ]

    def outcomes(self, prompt: Prompt, records: Mapping[str, Record]) -> list[Outcome]:
        replies = [sample.replies[-1] for sample in records["teacher"].samples]
        if _is_pair(prompt.row):
            verdict = self._of_pair(replies)
            columns = {side: prompt.row[side] for side in SIDES}
            if prompt.row.get("prompt"):
                columns = {"prompt": prompt.row["prompt"], **columns}
        else:
            verdict = self._of_reply(replies[0])
            columns = {"messages": prompt.row["messages"]}
        reason = first_fault({"judge": verdict})
        row = None if reason else row_of(prompt, mode_of(prompt.row) == "think", "", columns)
        return [Outcome(prompt, row, reason, verdicts={"judge": verdict}, records=records)]

    def _of_pair(self, replies: list[Reply]) -> Verdict:
        """The margin is the mean of both orders."""
        scores = [scores_of(reply, 2) for reply in replies]
        if None in scores:
            return self._unreadable()
        means = {side: sum(found[order.index(side)] for found, order in zip(scores, ORDERS, strict=True)) / 2
                 for side in SIDES}  # fmt: skip
        signs = {_sign(first - second) for first, second in (scores[0], scores[1][::-1])}
        self.counts.update(judged=1, orders_agree=len(signs) == 1, first_shown=sum(a > b for a, b in scores))
        return margin(means, self.settings.min_margin)

    def _of_reply(self, reply: Reply) -> Verdict:
        scores = scores_of(reply, 1)
        if scores is None:
            return self._unreadable()
        self.counts.update(judged=1)
        is_good = scores[0] >= self.settings.min_score
        return PASSED._replace(score=scores[0]) if is_good else Verdict(False, "low_score", scores[0])

    def _unreadable(self) -> Verdict:
        return Verdict(False, "unreadable_verdict")

    def report(self) -> dict[str, Any]:
        """Of the pairs: in how many both orders agree, and how often the reply that was shown first won, of 2 each."""
        judged = self.counts["judged"]
        if not judged or "orders_agree" not in self.counts:
            return {"judged": judged}
        return {
            "judged": judged,
            "orders_agree": self.counts["orders_agree"] / judged,
            "first_shown_wins": self.counts["first_shown"] / (2 * judged),
        }

    def lines(self) -> list[str]:
        found = self.report()
        if "orders_agree" not in found:
            return []
        return [
            f"judge: both orders agree in {found['orders_agree']:.0%} of {found['judged']:,} pairs; the reply that is "
            f"shown first wins {found['first_shown_wins']:.0%}"
        ]


def scores_of(reply: Reply, number: int) -> tuple[float, ...] | None:
    """The scores in the reply's last line; None where it has another form or they are out of range.

    Args:
        number: Of scores that were asked for, 1 or 2.
    """
    lines = reply.content.strip().splitlines()
    match = _LINES[number].fullmatch(lines[-1].strip().strip("*`").strip()) if lines else None
    scores = tuple(map(float, match.groups())) if match else ()
    return scores if scores and all(LEAST <= score <= MOST for score in scores) else None


def _is_pair(row: Mapping[str, Any]) -> bool:
    return bool(row.get("chosen")) and bool(row.get("rejected"))


def _shared_turns(row: Mapping[str, list[Message]]) -> list[Message]:
    pairs = zip(row["chosen"], row["rejected"], strict=False)
    number = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(row["chosen"]), len(row["rejected"])))
    return row["chosen"][:number]


def _shown(messages: list[Message], row: Mapping[str, Any]) -> str:
    """Turns as a judge reads them, the row's custom instructions among them, without reasoning."""
    instructions = (row.get("chat_template_kwargs") or {}).get("custom_instructions") or ""
    turns = instructed(messages, instructions)
    return "\n\n".join(f"[{turn['role'].capitalize()}]\n{_answer([turn])}" for turn in turns)


def _answer(messages: list[Message]) -> str:
    """Texts and calls of turns, without reasoning."""
    parts = []
    for message in messages:
        text = text_of(message.get("content"))
        parts.append(split_reasoning(text)[1] if message["role"] == "assistant" else text)
        parts += [f"(calls {call['function']})" for call in message.get("tool_calls") or []]
    return "\n".join(part for part in parts if part)


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)
