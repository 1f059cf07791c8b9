"""A run: one teacher is asked about all prompts, and one record of each is kept, whatever is killed in between.

counts = generate(folder, job.prompts(), converse, engine, stage, fingerprint=..., concurrency=256)
for prompt, record in records(folder):
    ...
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from smolpost.errors import UserError
from smolpost.files import read_json
from smolpost.screen import shown
from smolpost.synthesis.records import Converse, Prompt, Record, TeacherEngine
from smolpost.synthesis.run_begin import prepare
from smolpost.synthesis.run_folder import RETRIES, RUN, UPDATES, RunCounts, RunFolder
from smolpost.synthesis.runner import Event, TeacherRunner


class Settings(Protocol):
    """What is read of a stage; `settings.Generation` says what each field means."""

    chunk_size: int
    tasks: int
    retry_failed: bool


def generate(
    folder: Path,
    prompts: Iterable[Prompt],
    converse: Converse,
    engine: TeacherEngine,
    settings: Settings,
    *,
    fingerprint: Mapping[str, Any],
    concurrency: int,
    task: int | None = None,
    watch: Callable[[Event], None] | None = None,
) -> RunCounts:
    """Ask a teacher about all prompts that have no record in the folder yet.

    After a kill the same call goes on: what was asked and not answered is asked again, and nothing else. A prompt
    whose request fails is finished, too, with the error as its record. Where no prompt is left to ask about, the
    teacher need not be there.

    Args:
        folder: Of this run alone; made with its parents.
        prompts: With ids of their own.
        converse: Asks about one prompt; depends on its arguments alone.
        fingerprint: All that decides the replies beside prompts and teacher, fit for JSON: sampling, template, seed.
        concurrency: Prompts, and requests, under way at most.
        task: Work on this part of the prompts alone, in [0, tasks); None: on all of them.
        watch: Called for each finished prompt, in this process.
    Returns:
        Of all parts, so that done + failed = prompts where all of them are finished.
    Raises:
        UserError: No request can be answered; the run was begun with other prompts or settings or another teacher; two
            prompts have one id; or another process is at work on a part. What was answered before stays.
    """
    began = time.monotonic()
    if task is not None and not 0 <= task < settings.tasks:
        raise UserError(f"task={task} is not one of the {settings.tasks} tasks; give 0 to {settings.tasks - 1}")
    rank, world_size = (0, 1) if task is None else (task, settings.tasks)
    begun = {"given": fingerprint, "chunk_size": settings.chunk_size, "tasks": settings.tasks}

    def work(place: Path) -> None:
        TeacherRunner(place, converse, engine, concurrency=concurrency, watch=watch).run(None, rank, world_size)

    run = prepare(folder, prompts, **begun)
    work(folder)
    if settings.retry_failed and not run.unfinished() and (retry := _retry(folder, begun)):
        work(retry)
    return _counts(folder)._replace(seconds=time.monotonic() - began)


def records(folder: Path) -> Iterator[tuple[Prompt, Record]]:
    """All prompts in their order with one record each, the latest one, read as they are asked for.

    Raises:
        UserError: There is no run, it is unfinished, or a file is not what was written.
    """
    run = RunFolder(folder)
    if left := run.unfinished():
        parts = sorted({chunk.number % run.tasks for chunk in left})
        of_parts = f" in parts {', '.join(map(str, parts))}" if run.tasks > 1 else ""
        raise UserError(
            f"{shown(folder)} is unfinished: in {len(left)} of {len(run.chunks)} chunks of prompts some have no "
            f"reply{of_parts}; the command that began the run goes on with them"
        )
    return _latest([folder, *_retries(folder)])


def _latest(runs: Sequence[Path]) -> Iterator[tuple[Prompt, Record]]:
    """The first run's prompts, each with the record of the last run that has one."""
    first, *retries = (RunFolder(run).records() for run in runs)
    heads = [next(retry, None) for retry in retries]
    for prompt, record in first:
        for i, head in enumerate(heads):
            if head and head[0].id == prompt.id:  # a retry has its prompts in the order of the first run
                record, heads[i] = head[1], next(retries[i], None)
        yield prompt, record


def teacher_of(folder: Path) -> dict[str, Any]:
    """What the teacher said of itself before the run's first request; "version" names all that have answered."""
    begun = [read_json(run / RUN) for run in (folder, *_retries(folder))]
    said = [entry for run in begun for entry in (run["teacher"], *run.get(UPDATES, []))]
    versions = dict.fromkeys(entry["version"] for entry in said if entry.get("version"))
    return said[0] | {"version": ", then ".join(versions) or None}


# ---------------------------------------------------------------- retries


def _retries(folder: Path) -> list[Path]:
    """In the order in which they were begun."""
    return sorted((run.parent for run in folder.glob(f"{RETRIES}/[0-9]*/{RUN}")), key=lambda retry: int(retry.name))


def _retry(folder: Path, begun: Mapping[str, Any]) -> Path | None:
    """A run over the prompts that failed: the last one if it is unfinished, or a new one. None if no prompt failed.

    Args:
        folder: Of a finished run.
        begun: What it was begun with.
    """
    retries = _retries(folder)
    if retries and RunFolder(retries[-1]).unfinished():
        *retries, retry = retries
    elif _counts(folder).failed:
        retry = folder / RETRIES / str(len(retries) + 1)
    else:
        return None
    failed = (prompt for prompt, record in _latest([folder, *retries]) if record.error is not None)
    prepare(retry, failed, **begun, teacher=read_json(folder / RUN)["teacher"])
    return retry


def _counts(folder: Path) -> RunCounts:
    """Of a run and its retries."""
    counts = RunFolder(folder).counts()
    for retry in _retries(folder):
        found = RunFolder(retry).counts()
        counts = counts.with_chunk(found._replace(failed=-found.done))
    return counts
