"""What became of prompts, as pages and terminals show it: of a finished stage, or of a few outcomes at hand."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from smolpost.chat.reasoning import split_reasoning
from smolpost.chat.render import text_of
from smolpost.errors import UserError
from smolpost.files import read_json
from smolpost.synthesis.provenance import ACCEPTED, FAILED, FILTERED, provenance
from smolpost.synthesis.records import Message, Outcome
from smolpost.synthesis.results import FAILED_ROWS, FILTERED_ROWS, REPORT
from smolpost.synthesis.row_table import PROVENANCE_ROWS, ROWS

# Of the provenance: without the raw replies, which are most of its bytes.
COUNTS = ("role", "sample", "prompt_tokens", "completion_tokens", "finish_reason", "attempts")
COLUMNS = [
    "id", "source", "status", "reason", "error", "verdicts", *(f"replies.list.element.{name}" for name in COUNTS),
]  # fmt: skip
REPLY = "reply"  # name of a side that is not one of a pair


class Turn(NamedTuple):
    """A turn of a conversation.

    Attributes:
        reasoning: Of its think block; None without one.
        calls: Tool calls, as NAME(ARGUMENTS).
    """

    role: str
    reasoning: str | None
    text: str
    calls: tuple[str, ...]


class Shown(NamedTuple):
    """One outcome.

    Attributes:
        status: accepted | filtered | failed.
        prompt: Turns that all sides begin with.
        sides: Name -> the other turns: chosen and rejected, or a role and the number of its sample.
        verdicts: Each with "filter", "passed", "reason" and "score".
        replies: Each with COUNTS.
    """

    id: str
    source: str
    status: str
    reason: str
    error: str | None
    prompt: list[Turn]
    sides: dict[str, list[Turn]]
    verdicts: list[dict[str, Any]]
    replies: list[dict[str, Any]]

    @property
    def tokens(self) -> dict[str, int]:
        """Role -> tokens of all its replies, where the server has counted them."""
        found: Counter[str] = Counter()
        for reply in self.replies:
            found[reply["role"]] += reply["completion_tokens"] or 0
        return dict(found)


def shown(outcome: Outcome) -> Shown:
    """An outcome that has not been written."""
    entry = provenance(outcome, {"teachers": {}})
    if outcome.error is not None:
        return _failed(entry, outcome.prompt.row)
    samples = {role: [sample.messages for sample in record.samples] for role, record in outcome.records.items()}
    return _shown(entry, _samples(samples) if outcome.row is None else _sides(outcome.row))


class Samples:
    """A finished stage's outcomes.

    Raises:
        UserError: The folder has none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.report = read_json(folder / REPORT)
        if not is_generated(folder):
            raise UserError(f"{folder} holds no synthetic data: {ROWS} or {REPORT} is missing")
        columns = ["id", "source", "status", "reason"]
        self._table = pq.read_table(
            folder / PROVENANCE_ROWS, columns=columns, read_dictionary=columns[1:]
        ).unify_dictionaries()

    def choose(self, limit: int, source: str | None = None, identity: str | None = None) -> tuple[list[Shown], int]:
        """Some outcomes in their order, and how many fit in all.

        Each way in which prompts end (accepted, each reason, failed) gets the same number, as far as it has as many.

        Args:
            limit: At most so many.
            source: Of the prompts; None: all.
            identity: Id of one prompt; None: all.
        Raises:
            UserError: There is no such source or id.
        """
        ids, sources, statuses, reasons = (self._table.column(i).to_pylist() for i in range(4))
        groups: dict[tuple[str, str | None], list[int]] = defaultdict(list)
        for i, key in enumerate(zip(statuses, reasons, strict=True)):
            if source in (None, sources[i]) and identity in (None, ids[i]):
                groups[key].append(i)
        if not groups:
            known = ", ".join(self.report["sources"])
            asked = f"id {identity!r}" if identity is not None else f"source {source!r}"
            raise UserError(f"{asked} is not in {self.folder}; its sources are {known}")
        in_turn = (i for row in itertools.zip_longest(*groups.values()) for i in row if i is not None)
        chosen = sorted(itertools.islice(in_turn, limit))
        ranks = _ranks(statuses, chosen)
        entries = _taken(self.folder / PROVENANCE_ROWS, chosen, COLUMNS)
        rows = dict(zip(ranks[ACCEPTED], _taken(self.folder / ROWS, [*ranks[ACCEPTED].values()]), strict=True))
        filtered = _lines(self.folder / FILTERED_ROWS, ranks[FILTERED])
        failed = _lines(self.folder / FAILED_ROWS, ranks[FAILED])
        found = []
        for i, entry in zip(chosen, entries, strict=True):
            if i in failed:
                found.append(_failed(entry, failed[i]["row"]))
            else:
                found.append(_shown(entry, _sides(rows[i]) if i in rows else _samples(filtered[i]["samples"])))
        return found, sum(map(len, groups.values()))


def is_generated(folder: Path) -> bool:
    """Whether a folder is that of a finished stage of synthetic data."""
    return (folder / PROVENANCE_ROWS).is_file() and "facts" in read_json(folder / REPORT)


# ---------------------------------------------------------------- reading


def _ranks(statuses: Sequence[str], chosen: Iterable[int]) -> dict[str, dict[int, int]]:
    """Status -> {place among all outcomes: place among those of the status}, of the chosen ones."""
    wanted, counts = set(chosen), Counter()
    ranks: dict[str, dict[int, int]] = {ACCEPTED: {}, FILTERED: {}, FAILED: {}}
    for i, status in enumerate(statuses):
        if i in wanted:
            ranks[status][i] = counts[status]
        counts[status] += 1
    return ranks


def _taken(file: Path, places: Sequence[int], columns: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows of a Parquet file by their ascending places; row groups without any are not read."""
    if not places:
        return []
    opened, found, first = pq.ParquetFile(file), [], 0
    for group in range(opened.num_row_groups):
        number = opened.metadata.row_group(group).num_rows
        inside = [place - first for place in places if first <= place < first + number]
        if inside:
            found += opened.read_row_group(group, columns).take(pa.array(inside)).to_pylist()
        first += number
    return found


def _lines(file: Path, ranks: Mapping[int, int]) -> dict[int, dict[str, Any]]:
    """Place -> the line of its rank."""
    wanted = {rank: place for place, rank in ranks.items()}
    with open(file, encoding="utf-8", errors="replace") as lines:
        return {wanted[rank]: json.loads(line) for rank, line in enumerate(lines) if rank in wanted}


# ---------------------------------------------------------------- conversations


def _sides(row: Mapping[str, Any]) -> dict[str, list[Message]]:
    return {key: row[key] for key in ("chosen", "rejected") if row.get(key)} or {REPLY: row["messages"]}


def _samples(by_role: Mapping[str, Sequence[list[Message]]]) -> dict[str, list[Message]]:
    return {
        role if len(samples) == 1 else f"{role} {number}": messages
        for role, samples in by_role.items()
        for number, messages in enumerate(samples, 1)
    }


def _failed(entry: Mapping[str, Any], row: Mapping[str, Any]) -> Shown:
    """Without sides: the replies in the row are not the teacher's."""
    return _shown(entry, {REPLY: row.get("messages") or row.get("chosen") or []})._replace(sides={})


def _shown(entry: Mapping[str, Any], conversations: Mapping[str, list[Message]]) -> Shown:
    sides = {name: [turn_of(message) for message in messages] for name, messages in conversations.items()}
    shared = _shared(list(sides.values()))
    return Shown(
        **{key: entry[key] for key in ("id", "source", "status", "error", "verdicts", "replies")},
        reason=entry["reason"] or "",
        prompt=next(iter(sides.values()), [])[:shared],
        sides={name: turns[shared:] for name, turns in sides.items() if turns[shared:]},
    )


def _shared(sides: Sequence[list[Turn]]) -> int:
    """Number of turns that all sides begin with, up to the last one that is not a reply."""
    same = itertools.takewhile(lambda turns: len(set(turns)) == 1, zip(*sides, strict=False))
    number = len(list(same))
    ends = (max((i + 1 for i, t in enumerate(turns) if t.role != "assistant"), default=0) for turns in sides)
    return min([number, *ends])


def turn_of(message: Message) -> Turn:
    """A message as it is shown."""
    text = text_of(message.get("content") or "")
    reasoning, answer = split_reasoning(text) if message["role"] == "assistant" else (None, text)
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return Turn(
        message["role"],
        message.get("reasoning_content") or reasoning,
        answer,
        tuple(f"{call['name']}({_text(call.get('arguments'))})" for call in calls),
    )


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
