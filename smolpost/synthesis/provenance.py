"""Where each row came from: the source row, the teachers, their replies and what the filters said of them."""

from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from smolpost.files import digest
from smolpost.synthesis.records import Outcome, Record
from smolpost.synthesis.row_table import json_text

ACCEPTED, FILTERED, FAILED = "accepted", "filtered", "failed"
IDENTITY = ("model", "revision", "server", "server_version", "template_hash")  # columns taken from Facts.teachers


class Facts(TypedDict):
    """What holds for all rows of one stage; it is written into its report and its card.

    Attributes:
        name: Of the stage.
        kind: Of the stage.
        key: The stage's recipe key, for messages: stages.traces.
        job: The job's own settings.
        filters: The filters' settings.
        teachers: Role -> what the engine says of itself (IDENTITY's keys and others) and "sampling", a dict. Without
            addresses and keys: the card is published.
    """

    name: str
    kind: str
    key: str
    job: dict[str, Any]
    filters: dict[str, Any]
    teachers: dict[str, dict[str, Any]]


def status_of(outcome: Outcome) -> str:
    """ACCEPTED, FILTERED or FAILED."""
    if outcome.error is not None:
        return FAILED
    return FILTERED if outcome.row is None else ACCEPTED


def provenance(outcome: Outcome, facts: Facts) -> dict[str, Any]:
    """The outcome as a row of `row_table.PROVENANCE`."""
    return {
        "id": outcome.prompt.id,
        "source": outcome.prompt.source,
        "row_hash": digest(outcome.prompt.row, 64),
        "status": status_of(outcome),
        "reason": outcome.reason or None,
        "error": outcome.error,
        "verdicts": [{"filter": name, **verdict._asdict()} for name, verdict in outcome.verdicts.items()],
        "replies": [
            reply
            for role, record in outcome.records.items()
            for reply in _replies(role, record, facts["teachers"].get(role, {}))
        ],
    }


def _replies(role: str, record: Record, teacher: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    shared = {"role": role, "sampling": json_text(teacher.get("sampling", {}))}
    shared |= {name: None if teacher.get(name) is None else str(teacher[name]) for name in IDENTITY}
    for number, sample in enumerate(record.samples):
        for turn, reply in enumerate(sample.replies):
            raw = None if reply.raw is None else json_text(reply.raw)
            yield {**shared, "sample": number, "turn": turn, **reply._asdict(), "raw": raw}
