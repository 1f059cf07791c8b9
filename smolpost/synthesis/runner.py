"""datatrove's InferenceRunner over a run's folder and a teacher of ours.

The loop over prompts and the executors (this machine, Slurm, Ray) are datatrove's. Requests, failures and what is kept
on disk are ours: see `run_folder`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from smolpost.errors import UserError
from smolpost.synthesis.records import Converse, Prompt, Record, Reply, Request, RequestFailed, TeacherEngine
from smolpost.synthesis.run_begin import compare_teacher
from smolpost.synthesis.run_folder import Chunk, OpenChunk, RunCounts, RunFolder, part_lock


@contextlib.contextmanager
def _sinks_kept() -> Iterator[None]:
    """Keep a user's sinks of loguru: datatrove removes all of them when it is imported."""
    from loguru import logger

    logger.remove = logger.add = lambda *_, **__: None
    try:
        yield
    finally:
        del logger.remove, logger.add


with _sinks_kept():
    from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner

FINISHED_TASKS = 1024  # that datatrove's loop may hold before it looks at all of them


class Event(NamedTuple):
    """A prompt that has been answered just now, or that failed.

    Attributes:
        counts: Of all finished prompts of the run, as far as this process knows; `seconds` since it began to ask.
        found: Of those that were finished before.
    """

    prompt: Prompt
    record: Record
    counts: RunCounts
    found: RunCounts


class Pending(NamedTuple):
    """What datatrove's loop takes for a document."""

    id: str
    prompt: Prompt
    chunk: OpenChunk


class TeacherRunner(InferenceRunner):
    """Asks a teacher about the prompts of one or of all parts of a run that have no record.

    A step without input or output: it reads the run's prompts and writes its records. It can be pickled if `converse`,
    the engine and `watch` can.

    Args:
        folder: That `prepare` has written.
        converse: Asks about one prompt.
        concurrency: Prompts, and requests, under way at most.
        watch: Called for each finished prompt.
    """

    name, type = "Teacher", "Model call"

    def __init__(
        self,
        folder: Path,
        converse: Converse,
        engine: TeacherEngine,
        *,
        concurrency: int,
        watch: Callable[[Event], None] | None = None,
    ):
        config = InferenceConfig(
            server_type="custom",
            model_name_or_path="",
            max_concurrent_generations=concurrency,
            max_concurrent_documents=concurrency + FINISHED_TASKS,
        )
        super().__init__(converse, config, output_writer=contextlib.nullcontext())
        self.folder, self.engine, self.watch = folder, engine, watch
        self._open: set[OpenChunk] = set()
        self._failure: Exception | None = None

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Ask about all prompts of part `rank`, or of all parts where the world's size is 1.

        Raises:
            UserError: No request can be answered, the teacher is not the one that has answered so far, or another
                process is at work on a part.
        """
        run = RunFolder(self.folder)
        if world_size not in (1, run.tasks):
            raise UserError(f"tasks={world_size} for a run that was begun with tasks={run.tasks}; set it back")
        parts = range(run.tasks) if world_size == 1 else [rank]
        with contextlib.ExitStack() as held:
            for part in parts:
                held.enter_context(part_lock(run, part))
            if chunks := run.unfinished(parts):
                self._counts = self._found = run.counts()
                self._began, self._failure = time.monotonic(), None
                self._slots = asyncio.Semaphore(self.config.max_concurrent_generations)
                try:
                    asyncio.run(self.run_async(self._pending(run, chunks), rank))
                finally:
                    for chunk in self._open:
                        chunk.close()

    def _pending(self, run: RunFolder, chunks: Iterable[Chunk]) -> Iterator[Pending]:
        for chunk in chunks:
            opened = OpenChunk(run, chunk)
            self._open.add(opened)
            self._counts = self._counts.with_chunk(opened.counts)
            self._found = self._found.with_chunk(opened.counts)
            yield from (Pending(prompt.id, prompt, opened) for prompt in opened.pending())

    # ------------------------------------------------------------ called by datatrove

    @contextlib.asynccontextmanager
    async def _init_server(self, rank: int) -> AsyncIterator[TeacherEngine]:
        async with self.engine as engine:
            compare_teacher(self.folder, await engine.identity())
            yield engine

    async def metrics_reporter(self, interval: int = 0) -> None:
        """Nothing: `watch` sees each prompt."""

    async def _async_data_gen(self, sync_gen: Iterator[Pending]) -> AsyncIterator[Pending]:
        # The loop that takes them would wait on all tasks at once for each prompt, and see a failure late.
        for pending in sync_gen:
            await self._slots.acquire()
            if self._failure:
                raise self._failure
            yield pending

    async def _handle_record(
        self,
        doc: Pending,
        rank: int,
        chunk_index: int,
        rollout_fn: Converse,
        output_writer_context: None,
        server: TeacherEngine,
        semaphore: asyncio.Semaphore,
    ) -> None:
        """Ask about one prompt and keep its record."""
        prompt, chunk = doc.prompt, doc.chunk

        async def ask(request: Request) -> Reply:
            if reply := chunk.answered(prompt, request):
                return reply
            async with semaphore:
                reply = (await server.ask(request))._replace(seed=request.seed)
            chunk.keep_reply(prompt, request, reply)
            return reply

        try:
            try:
                record = Record(prompt.id, prompt.source, await rollout_fn(prompt, ask))
            except RequestFailed as failed:
                record = Record(prompt.id, prompt.source, [], failed.reason, failed.attempts)
            self._keep(prompt, record, chunk)
        except Exception as error:
            self._failure = self._failure or error
            raise
        finally:
            self._slots.release()

    def _keep(self, prompt: Prompt, record: Record, chunk: OpenChunk) -> None:
        if chunk.keep(record):
            self._open.discard(chunk)
        self._counts = self._counts.with_record(record)
        if self.watch:
            counts = self._counts._replace(seconds=time.monotonic() - self._began)
            self.watch(Event(prompt, record, counts, self._found))


def pipeline(folder: Path, converse: Converse, engine: TeacherEngine, *, concurrency: int) -> list[TeacherRunner]:
    """What datatrove's executors run: LocalPipelineExecutor, SlurmPipelineExecutor or RayPipelineExecutor.

    The folder has been prepared, and the executor's `tasks` are those of the run.
    """
    return [TeacherRunner(folder, converse, engine, concurrency=concurrency)]
