"""Preference pairs: of two replies to a prompt, the stronger teacher's is chosen and the weaker one's rejected."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

from smolpost.chat.render import text_of
from smolpost.synthesis.filters import Verdicts, first_fault, judge_sample, of_side
from smolpost.synthesis.filters.answer_workers import verify_answers
from smolpost.synthesis.filters.answers import reference_of
from smolpost.synthesis.filters.sides import SIDES, answers_as_kept, different, dissimilar, same_text
from smolpost.synthesis.jobs.asking import Asker, mode_of_replies, row_of
from smolpost.synthesis.jobs.complement import Complement
from smolpost.synthesis.jobs.prompts import asks_nothing, mode_of, question_of
from smolpost.synthesis.records import Ask, Job, Outcome, Prompt, Record, Reply, Sample, Verdict
from smolpost.synthesis.replies import canonical
from smolpost.synthesis.settings import Filters, Teacher


class Settings(Protocol):
    """What is read of a stage; `stages.pairs` says what each field means."""

    chosen: Teacher
    rejected: Teacher
    keep: str
    max_similarity: float | None
    suffix: str
    filters: Filters
    seed: int


class PreferencePairs(Job):
    """
    Args:
        rows: (name of the source, row) of the prompts mixture; conversations or pairs.
        complete: Sources that are left out, as they have pairs of the asked mode already.
    """

    roles = SIDES

    def __init__(self, settings: Settings, rows: Iterable[tuple[str, dict[str, Any]]], complete: Collection[str] = ()):
        self.settings = settings
        self.left = Complement(rows, complete)
        self.askers = {role: Asker(role, getattr(settings, role), settings.seed) for role in self.roles}

    def prompts(self) -> Iterator[Prompt]:
        return iter(self.left)

    async def converse(self, role: str, prompt: Prompt, ask: Ask) -> list[Sample]:
        if self._cannot_ask(prompt):
            return []
        asker, messages = self.askers[role], question_of(prompt.row)
        reply = await ask(asker.request(prompt, messages, self._mode(prompt)))
        return [Sample([*messages, asker.turn(reply)], [reply])]

    def _mode(self, prompt: Prompt) -> bool | None:
        return mode_of(prompt.row, self.settings.chosen.thinking)

    def _cannot_ask(self, prompt: Prompt) -> str:
        """Why a row cannot be asked about, as it is counted in reports; "" where it can."""
        if asks_nothing(question_of(prompt.row)):
            return "no_user_turn"
        return "template_tools" if any(asker.cannot_ask(prompt.row) for asker in self.askers.values()) else ""

    def outcomes(self, prompt: Prompt, records: Mapping[str, Record]) -> list[Outcome]:
        if reason := self._cannot_ask(prompt):
            return [Outcome(prompt, None, reason, records=records)]
        samples = {role: records[role].samples[0] for role in self.roles}
        replies = {role: sample.replies[0] for role, sample in samples.items()}
        thinking = self._mode(prompt)
        verdicts = self._verdicts(prompt, samples["chosen"], replies, thinking)
        reason = first_fault(verdicts)
        mode = mode_of_replies(thinking, self.settings.chosen, [replies["chosen"]])
        row = None if reason else self._row(prompt, mode, samples)
        return [Outcome(prompt, row, reason, verdicts=verdicts, records=records)]

    def _verdicts(
        self, prompt: Prompt, chosen: Sample, replies: Mapping[str, Reply], thinking: bool | None
    ) -> Verdicts:
        """What the filters say of the chosen side, and how the sides differ.

        The rejected reply may have any fault, but there has to be one: a turn without text cannot be trained on.
        """
        settings = self.settings
        found = of_side("chosen", judge_sample(chosen, prompt, settings.filters, thinking=thinking))
        texts = [canonical(replies[side]) for side in SIDES]
        # The smollm3 template leaves the reasoning out in no-think mode.
        shown = texts if thinking is not False else [replies[side].content for side in SIDES]
        if any(reply.tool_calls for reply in replies.values()):
            shown = [f"{text}\n{replies[side].tool_calls}" for side, text in zip(SIDES, shown, strict=True)]
        found["different"] = different(*shown)
        is_empty = not shown[1].strip()
        found["rejected.empty"] = Verdict(not is_empty, "rejected_empty" if is_empty else "")
        if settings.max_similarity is not None:
            found["similarity"] = dissimilar(*shown, settings.max_similarity)
        if settings.keep != "different":
            verify = same_text if settings.filters.answer == "off" else _as_mathematics
            found["keep"] = answers_as_kept(settings.keep, *texts, reference_of(prompt.row), verify)
        return found

    def _row(self, prompt: Prompt, thinking: bool, samples: Mapping[str, Sample]) -> dict[str, Any]:
        users = [message for message in question_of(prompt.row) if message["role"] == "user"]
        sides = {side: samples[side].messages for side in SIDES}
        return {"prompt": text_of(users[-1].get("content"))} | row_of(prompt, thinking, self.settings.suffix, sides)

    def report(self) -> dict[str, Any]:
        return self.left.report()

    def lines(self) -> list[str]:
        return self.left.lines()


def _as_mathematics(reference: str, answer: str) -> Verdict:
    [verdict] = verify_answers([(reference, answer)])
    return verdict
