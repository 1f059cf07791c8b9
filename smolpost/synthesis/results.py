"""Outcomes of a job, streamed into the files of a stage: rows, provenance, what was filtered, what failed, counts.

rows.parquet        the accepted rows in SmolTalk2's columns, and the id of each
provenance.parquet  one row per prompt: source row, replies with their teachers, verdicts
filtered.jsonl      prompts that a filter dropped: reason, scores and conversations
failed.jsonl        prompts without a reply: error, tries and the row as it was read
report.json         the counts
README.md           the dataset card
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from smolpost.errors import UserError
from smolpost.files import write_json, write_text
from smolpost.synthesis.card import card
from smolpost.synthesis.provenance import ACCEPTED, FAILED, FILTERED, Facts, provenance, status_of
from smolpost.synthesis.records import Outcome
from smolpost.synthesis.row_table import (
    MESSAGES,
    PAIRS,
    PROVENANCE,
    PROVENANCE_ROWS,
    ROWS,
    Table,
    as_entry,
    further_kwargs,
    json_text,
    table,
)
from smolpost.synthesis.tally import Tally

FILTERED_ROWS, FAILED_ROWS = "filtered.jsonl", "failed.jsonl"
REPORT, CARD = "report.json", "README.md"
MOST_ERRORS = 20  # different ones in the report
# Reason that dropped most rows -> what to do, for a stage where none is left.
REMEDIES = {
    "cut": "raise the teacher's max_new_tokens",
    "unclosed_thinking": "raise the teacher's max_new_tokens",
    "no_thinking": "take a teacher that thinks when asked, or set its thinking to false",
    "unasked_thinking": "take a teacher that can leave thinking out, or set its thinking to true",
    "too_short": "lower filters.min_tokens",
    "too_long": "raise filters.max_tokens",
    "repetition": "raise filters.max_repetition, or the teacher's temperature",
    "loop": "raise the teacher's temperature",
    "language": "set filters.language to false, or give prompts in one language each",
    "near_duplicate": "raise filters.near",
    "wrong_answer": "take a stronger teacher, or set filters.answer to label",
    "undecided": "set filters.answer to label",
    "no_reference": "set filters.answer and keep to what needs no right answer, or give prompts that have one",
    "identical": "take a weaker rejected teacher, or raise its temperature",
    "too_similar": "take a weaker rejected teacher, or raise max_similarity",
    "chosen_wrong": "take a stronger chosen teacher, or set keep to different",
    "rejected_empty": "take another rejected teacher, or raise its max_new_tokens",
    "rejected_right": "take a weaker rejected teacher, or set keep to chosen_right",
    "margin": "take a weaker rejected teacher, or lower min_margin",
    "unanswered": "raise the teacher's max_new_tokens, or take another teacher",
    "malformed_call": "take a teacher that writes calls as JSON, or give prompts without tools",
    "unknown_function": "take a teacher that calls the given functions, or give prompts without tools",
    "refused": "take another teacher, or other prompts: the server refuses to answer",
    "empty": "take another teacher: its answers are empty",
    "think_tags": "take another teacher: its answers hold tags of think blocks",
    "contaminated": "give other prompts, or take the file out of filters.against",
    "content_filter": "take another teacher, or other prompts: the server's filter stops the replies",
    "unfinished": "take another server: its replies end for reasons that OpenAI's API does not have",
    "none_right": "take a stronger teacher, raise num_samples, or set filters.answer to label",
    "unreadable_verdict": "take a judge that ends in the form it is asked for, or raise its max_new_tokens",
    "low_score": "lower min_score, or give better rows",
    "no_user_turn": "give prompts with a user turn before the last reply",
    "one_turn": "give more rows of each source, or rows with several user turns",
    "tool_turns": "give prompts without tool results, or set turns to last where the stage has it",
    "template_tools": "take a checkpoint as the teacher, or give the tools as `tools`",
    "not_text": "take another teacher: its replies are not valid Unicode",
}


def write(
    folder: Path, outcomes: Iterable[Outcome], *, facts: Facts, max_failed: float, num_prompts: int
) -> dict[str, Any]:
    """Write all files of the stage. They are read one outcome at a time, so memory does not grow with their number.

    The caller gives a folder that is no stage's before its manifest is written. After an error its files are not
    complete.

    Args:
        folder: Exists.
        outcomes: One for each prompt, in the order of the rows.
        max_failed: Share of the prompts that may be without a reply, in [0, 1].
        num_prompts: Number of outcomes that there have to be.
    Returns:
        The report: "prompts" = "accepted" + sum of "filtered" (reason -> number) + "failed"; "errors" (the commonest
        -> number); "sources" (source -> the same counts); "teachers" (role -> "replies", "cut" (at the length limit),
        "prompt_tokens", "completion_tokens"); "lengths" (`Tally.report`); and the facts.
    Raises:
        UserError: An outcome is not exactly one of a row, a reason and an error; there are more or fewer than
            num_prompts; more have failed than max_failed allows; or no row was accepted.
    """
    counts, tally = Counts(), Tally()
    with contextlib.ExitStack() as files:
        rows = Rows(folder / ROWS, files)
        sources = files.enter_context(table(folder / PROVENANCE_ROWS, PROVENANCE))
        filtered, failed = (files.enter_context(open(folder / name, "wb")) for name in (FILTERED_ROWS, FAILED_ROWS))
        for outcome in outcomes:
            outcome = _checked(outcome, facts)
            sources.add(provenance(outcome, facts))
            counts.add(outcome)
            tally.add(outcome)
            if outcome.error is not None:
                _write_failed(failed, outcome)
            elif outcome.row is None:
                _write_filtered(filtered, outcome)
            else:
                rows.add(outcome)
    report = counts.report() | {"lengths": tally.report(), "facts": facts}
    _check(report, facts["key"], max_failed, num_prompts)
    write_json(folder / REPORT, report)
    write_text(folder / CARD, card(report))
    return report


class Rows:
    """The file of accepted rows; the first row decides whether its columns are those of conversations or of pairs.

    Args:
        files: Closes the file.
    """

    def __init__(self, file: Path, files: contextlib.ExitStack):
        self._file, self._files = file, files
        self._table: Table | None = None

    def add(self, outcome: Outcome) -> None:
        if self._table is None:
            schema = PAIRS if "chosen" in outcome.row else MESSAGES
            self._table = self._files.enter_context(table(self._file, schema))
        self._table.add(as_entry(outcome.prompt.id, outcome.row))


class Counts:
    """What became of the prompts, in all and by source, and what the teachers' replies took."""

    def __init__(self):
        self.statuses: Counter[tuple[str, str, str]] = Counter()  # (source, status, reason)
        self.errors: Counter[str] = Counter()
        self.teachers: dict[str, Counter[str]] = {}

    def add(self, outcome: Outcome) -> None:
        self.statuses[outcome.prompt.source, status_of(outcome), outcome.reason] += 1
        if outcome.error is not None and (outcome.error in self.errors or len(self.errors) < 10_000):
            self.errors[outcome.error] += 1
        for role, record in outcome.records.items():
            counts = self.teachers.setdefault(role, Counter(replies=0, cut=0, prompt_tokens=0, completion_tokens=0))
            for reply in (reply for sample in record.samples for reply in sample.replies):
                counts["replies"] += 1
                counts["cut"] += reply.finish_reason == "length"
                counts["prompt_tokens"] += reply.prompt_tokens or 0
                counts["completion_tokens"] += reply.completion_tokens or 0

    def report(self) -> dict[str, Any]:
        names = list(dict.fromkeys(source for source, _, _ in self.statuses))
        return {
            **self._of(set(names)),
            "errors": dict(self.errors.most_common(MOST_ERRORS)),
            "sources": {name: self._of({name}) for name in names},
            "teachers": {role: dict(counts) for role, counts in self.teachers.items()},
        }

    def _of(self, sources: set[str]) -> dict[str, Any]:
        totals: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for (source, status, reason), number in self.statuses.items():
            if source in sources:
                totals[status] += number
                if status == FILTERED:
                    reasons[reason] += number
        return {
            "prompts": totals.total(),
            "accepted": totals[ACCEPTED],
            "filtered": dict(reasons.most_common()),
            "failed": totals[FAILED],
        }


# ---------------------------------------------------------------- checks


def _checked(outcome: Outcome, facts: Facts) -> Outcome:
    """The outcome; a row that no file can hold is filtered.

    Raises:
        UserError: It is not exactly one of a row, a reason and an error, or its row has a key without a column.
    """
    found = [name for name in ("row", "error") if getattr(outcome, name) is not None] + ["reason"] * bool(
        outcome.reason
    )
    if len(found) != 1:
        raise UserError(
            f"{facts['key']}: prompt {outcome.prompt.id} became {' and '.join(found) or 'nothing'}; the outcome of a "
            "job is exactly one of a row, a reason and an error; mend the job"
        )
    if outcome.row is None:
        return outcome
    if further := further_kwargs(outcome.row):
        raise UserError(
            f"{facts['key']}: chat_template_kwargs.{further[0]} of prompt {outcome.prompt.id} has no column in "
            f"{ROWS}; the job's rows may state custom_instructions, enable_thinking, python_tools and xml_tools"
        )
    try:
        orjson.dumps(outcome.row)
    except TypeError:  # half of a surrogate pair, which a teacher wrote as an escape
        return outcome._replace(row=None, reason="not_text")
    return outcome


def _check(report: Mapping[str, Any], key: str, max_failed: float, num_prompts: int) -> None:
    """
    Raises:
        UserError: As `write`.
    """
    prompts, failed = report["prompts"], report["failed"]
    if prompts != num_prompts:
        raise UserError(
            f"{key}: the job gave {prompts:,} outcomes for {num_prompts:,} prompts; it has to give exactly one for "
            "each; mend the job"
        )
    if failed > max_failed * prompts:
        error, number = next(iter(report["errors"].items()))
        share = math.ceil(1000 * failed / prompts) / 1000
        raise UserError(
            f"{key}: {failed:,} of {prompts:,} prompts have failed, more than max_failed={max_failed:g} allows; the "
            f"commonest error, {number:,} times: {error}; {key}.retry_failed=true asks exactly these again, "
            f"{key}.max_failed={share:g} accepts them"
        )
    if not report["accepted"]:
        raise UserError(_nothing_accepted(report, key))


def _nothing_accepted(report: Mapping[str, Any], key: str) -> str:
    if not report["prompts"]:
        return f"{key}: no row can be made from 0 prompts; give its prompts mixture at least one row"
    counts = report["filtered"] | ({"failed": report["failed"]} if report["failed"] else {})
    stated = ", ".join(f"{number:,} {reason}" for reason, number in counts.items())
    commonest = next(iter(report["filtered"]), "failed")
    if commonest == "failed":
        remedy = f"the commonest error: {next(iter(report['errors']))}"
    else:
        of_side = commonest.removeprefix("chosen_").removeprefix("rejected_")
        remedy = REMEDIES.get(commonest) or REMEDIES.get(of_side, f"loosen the filter that says {commonest}")
    return f"{key}: none of {report['prompts']:,} prompts became a row ({stated}); {remedy}"


# ---------------------------------------------------------------- what did not become a row


def _write_filtered(file: BinaryIO, outcome: Outcome) -> None:
    _write_line(
        file,
        {
            "id": outcome.prompt.id,
            "source": outcome.prompt.source,
            "reason": outcome.reason,
            "scores": {name: v.score for name, v in outcome.verdicts.items() if v.score is not None},
            "samples": {role: [s.messages for s in record.samples] for role, record in outcome.records.items()},
        },
    )


def _write_failed(file: BinaryIO, outcome: Outcome) -> None:
    failed = {role: list(record.attempts) for role, record in outcome.records.items() if record.error is not None}
    entry = {"id": outcome.prompt.id, "source": outcome.prompt.source, "error": outcome.error, "attempts": failed}
    _write_line(file, entry | {"row": outcome.prompt.row})


def _write_line(file: BinaryIO, entry: dict[str, Any]) -> None:
    file.write(json_text(entry).encode() + b"\n")
