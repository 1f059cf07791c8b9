"""The folder of a run: its prompts, what it was begun with, and one record for each prompt.

    run.json                   what the run was begun with
    prompts.jsonl              one prompt per line
    chunks.json                at which byte each chunk of prompts begins
    replies/00012.jsonl        records of chunk 12 in the order in which they were finished; the file only grows
    replies/00012.turns.jsonl  replies inside conversations of chunk 12 that may be unfinished; until all are finished
    replies/00012.json         counts of chunk 12, and at which byte the record of each prompt begins; written last
    retries/1/                 a run over the prompts that failed

Chunk c belongs to part c modulo the number of tasks, so two hosts with a part each never write the same file.
"""

import contextlib
import fcntl
import functools
import itertools
import json
import os
import socket
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smolpost.errors import UserError
from smolpost.files import digest, read_json, write_text
from smolpost.screen import shown
from smolpost.synthesis.records import Prompt, Record, Reply, Request, Sample

RUN, PROMPTS, CHUNKS, REPLIES, RETRIES = "run.json", "prompts.jsonl", "chunks.json", "replies", "retries"
UPDATES = "teacher_updates"  # in RUN: what the teacher said of itself later, where its server was updated


class RunCounts(NamedTuple):
    """Of a run or of a chunk of it.

    Attributes:
        prompts: All of them; done + failed where the run is finished, and more before.
        done, failed: Prompts with replies, and prompts that ended in an error.
        prompt_tokens, completion_tokens: Of all replies in records, as far as the server counted them.
        seconds: That the call took which counted them.
    """

    prompts: int
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def with_record(self, record: Record) -> "RunCounts":
        replies = [reply for sample in record.samples for reply in sample.replies]
        return self._replace(
            done=self.done + (record.error is None),
            failed=self.failed + (record.error is not None),
            prompt_tokens=self.prompt_tokens + sum(reply.prompt_tokens or 0 for reply in replies),
            completion_tokens=self.completion_tokens + sum(reply.completion_tokens or 0 for reply in replies),
        )

    def with_chunk(self, chunk: "RunCounts") -> "RunCounts":
        """Also of the finished prompts of a chunk of this run."""
        sums = [mine + theirs for mine, theirs in zip(self, chunk, strict=True)]
        return RunCounts(self.prompts, *sums[1:])


class Chunk(NamedTuple):
    """Prompts whose records share a file.

    Attributes:
        number: Of the chunk in the run, from 0.
        offset: First byte of its first prompt in the file of prompts.
        num_prompts: May be 0, where there are fewer prompts than parts.
    """

    number: int
    offset: int
    num_prompts: int


class RunFolder:
    """A folder that `prepare` has written.

    Attributes:
        tasks: Number of parts.
        num_prompts: In all parts.
        chunks: In the order of the prompts.

    Raises:
        UserError: There is no run.
    """

    def __init__(self, path: Path):
        self.path = path
        begun = read_json(path / RUN)
        if not begun:
            raise UserError(f"{shown(path)} is not the folder of a run: it has no {RUN}; run the stage that makes it")
        self.tasks, self.num_prompts = begun["tasks"], begun["prompts"]["number"]
        offsets = json.loads((path / CHUNKS).read_text())
        sizes = map(len, bounds(self.num_prompts, len(offsets)))
        self.chunks = [Chunk(n, *entry) for n, entry in enumerate(zip(offsets, sizes, strict=True))]

    def prompts(self, chunk: Chunk) -> Iterator[Prompt]:
        with open(self.path / PROMPTS, "rb") as file:
            file.seek(chunk.offset)
            for line in itertools.islice(file, chunk.num_prompts):
                yield Prompt(**json.loads(line))

    def file(self, chunk: Chunk, ending: str) -> Path:
        return self.path / REPLIES / f"{chunk.number:05d}{ending}"

    def finished(self, chunk: Chunk) -> dict[str, Any]:
        """Counts and byte offsets of a finished chunk; {} while prompts have no record."""
        return read_json(self.file(chunk, ".json"))

    def unfinished(self, parts: Collection[int] | None = None) -> list[Chunk]:
        """Chunks that have prompts without a record, of all parts or of these."""
        mine = [chunk for chunk in self.chunks if parts is None or chunk.number % self.tasks in parts]
        return [chunk for chunk in mine if chunk.num_prompts and not self.finished(chunk)]

    def counts(self) -> RunCounts:
        """Of the finished chunks of all parts."""
        indexes = filter(None, map(self.finished, self.chunks))
        chunks = (RunCounts(**index["counts"]) for index in indexes)
        return functools.reduce(RunCounts.with_chunk, chunks, RunCounts(self.num_prompts))

    def num_finished(self) -> int:
        """Prompts with a record, those of unfinished chunks among them."""
        files = (self.file(chunk, ".jsonl") for chunk in self.unfinished())
        lines = sum(file.read_bytes().count(b"\n") for file in files if file.exists())
        counts = self.counts()
        return counts.done + counts.failed + lines

    def records(self) -> Iterator[tuple[Prompt, Record]]:
        """Of the finished chunks, in the order of the prompts.

        Raises:
            UserError: A file is not what was written.
        """
        for chunk in self.chunks:
            if index := self.finished(chunk):
                yield from self._records(chunk, index["offsets"])

    def _records(self, chunk: Chunk, offsets: list[int]) -> Iterator[tuple[Prompt, Record]]:
        replies = self.file(chunk, ".jsonl")
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(open(replies, "rb")) if replies.exists() else None
            for prompt, offset in zip(self.prompts(chunk), offsets, strict=True):
                record = None
                if file:
                    file.seek(offset)
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        record = record_of(json.loads(file.readline()))
                if record is None or record.id != prompt.id:
                    raise UserError(
                        f"{shown(replies)} has no record of prompt {prompt.id!r} at byte {offset}, where it was "
                        f"written; remove {self.file(chunk, '.json').name} beside it, and the same command asks again "
                        "for what is missing"
                    )
                yield prompt, record


def bounds(number: int, parts: int) -> list[range]:
    """Positions of each part of so many things, as equal as can be."""
    return [range(number * part // parts, number * (part + 1) // parts) for part in range(parts)]


# ---------------------------------------------------------------- work


class OpenChunk:
    """An unfinished chunk that takes records, beside those that earlier processes have written.

    Attributes:
        counts: Of its records so far.
    """

    def __init__(self, run: RunFolder, chunk: Chunk):
        self.run, self.chunk, self.counts = run, chunk, RunCounts(chunk.num_prompts)
        # Byte offset of each prompt's record, in the order of the prompts; None without one.
        self._offsets: dict[str, int | None] = dict.fromkeys(prompt.id for prompt in run.prompts(chunk))
        self._left = len(self._offsets)
        self._answered: dict[tuple[str, str], list[Reply]] = defaultdict(list)
        self._records, self._turns = Lines(run.file(chunk, ".jsonl")), Lines(run.file(chunk, ".turns.jsonl"))
        for offset, line in self._records.whole():
            self._note(record_of(line), offset)
        for _, line in self._turns.whole():
            if self._offsets[line["id"]] is None:
                self._answered[line["id"], line["request"]].append(Reply(**line["reply"]))
        self._finish_if_whole()

    def pending(self) -> Iterator[Prompt]:
        """Prompts without a record."""
        return (prompt for prompt in self.run.prompts(self.chunk) if self._offsets[prompt.id] is None)

    def answered(self, prompt: Prompt, request: Request) -> Reply | None:
        """The reply that an earlier process had to this request of a conversation it did not finish."""
        found = self._answered and self._answered.get((prompt.id, _name(request)))
        return found.pop(0) if found else None

    def keep_reply(self, prompt: Prompt, request: Request, reply: Reply) -> None:
        self._turns.append({"id": prompt.id, "request": _name(request), "reply": reply._asdict()})

    def keep(self, record: Record) -> bool:
        """Write the last word on a prompt. Returns whether it was the last prompt, and the chunk is finished."""
        self._note(record, self._records.append(record_json(record)))
        self._finish_if_whole()
        return not self._left

    def close(self) -> None:
        self._records.close()
        self._turns.close()

    def _note(self, record: Record, offset: int) -> None:
        if self._offsets[record.id] is None:  # one record counts, whatever wrote a second one
            self._offsets[record.id] = offset
            self._left -= 1
            self.counts = self.counts.with_record(record)

    def _finish_if_whole(self) -> None:
        if not self._left:
            self._records.sync()
            index = {"counts": self.counts._asdict(), "offsets": list(self._offsets.values())}
            write_text(self.run.file(self.chunk, ".json"), json.dumps(index) + "\n")
            self.close()
            self._turns.file.unlink()


class Lines:
    """A file of JSON lines that only grows, open for appending.

    A line is there whole or it does not count: the rest of a line that a kill left at the end is cut off first.
    """

    def __init__(self, file: Path):
        self.file, self._size = file, 0
        self._opened = open(file, "ab", buffering=0)  # noqa: SIM115

    def whole(self) -> Iterator[tuple[int, Any]]:
        """First byte and value of each line. To be read to its end before lines are appended."""
        with open(self.file, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                offset, self._size = self._size, self._size + len(line)
                try:
                    value = json.loads(line)
                except ValueError:  # blocks that a crash of the machine left empty
                    continue
                yield offset, value
        self._opened.truncate(self._size)

    def append(self, value: Any) -> int:
        """Returns the line's first byte."""
        line, offset = json_line(value), self._size
        try:
            if (written := self._opened.write(line)) < len(line):  # a disk that is almost full takes a part
                self._opened.write(line[written:])
        except OSError as error:
            self._opened.truncate(offset)
            raise OSError(error.errno, error.strerror, str(self.file)) from error
        self._size += len(line)
        return offset

    def sync(self) -> None:
        """Bring all lines to the disk."""
        os.fsync(self._opened.fileno())

    def close(self) -> None:
        self._opened.close()


@contextlib.contextmanager
def part_lock(run: RunFolder, part: int) -> Iterator[None]:
    """Be the only process that works on a part; the kernel frees the lock of a process that dies.

    Raises:
        UserError: Another process is at work on it.
    """
    with open(run.path / f".part-{part}.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            other = f", or give this process another part of the {run.tasks}" if run.tasks > 1 else ""
            raise UserError(
                f"part {part} of {shown(run.path)} is at work in {file.read().strip() or 'another process'}; wait for "
                f"its end{other}"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


# ---------------------------------------------------------------- JSON


def json_line(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a character, as servers cut them; escaped, it comes back as it was
        return (json.dumps(value) + "\n").encode()


def record_json(record: Record) -> dict[str, Any]:
    samples = [
        sample._asdict() | {"replies": [reply._asdict() for reply in sample.replies]} for sample in record.samples
    ]
    return record._asdict() | {"samples": samples}


def record_of(line: Mapping[str, Any]) -> Record:
    """The record that `record_json` made into this."""
    samples = [
        Sample(sample["messages"], [Reply(**reply) for reply in sample["replies"]]) for sample in line["samples"]
    ]
    return Record(**{**line, "samples": samples, "attempts": tuple(line["attempts"])})


def _name(request: Request) -> str:
    return digest(request._asdict(), 32)
