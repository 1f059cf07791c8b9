"""Where the stages of pipelines are, read from their folders: manifests, logs, checkpoints and locks."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from smolpost import schema, signals, stage_log
from smolpost.errors import UserError
from smolpost.evaluation import results
from smolpost.files import MANIFEST
from smolpost.pipeline import manifest, record
from smolpost.screen import shown

WORKING = {  # command of a log -> what it does
    "prepare": "preparing rows",
    "train": "training",
    "make": "at work",
    "generate": "generating",
    "eval": "measuring",
}


@dataclass
class StageStatus:
    """
    Attributes:
        state: "finished", "running", "to evaluate" (made and not measured), "stopped", "failed" or "waiting".
        seconds: That a finished stage took.
        finished: When, UTC.
        doing: What the running command does.
        step, steps, loss, tokens_per_second, seconds_left: Of a training, as last logged.
        checkpoint: Step that a stopped training goes on from.
        why: One line: what stopped it, what failed, or why it is to be made.
        line: The last one in its log, while it runs.
        log: The file; None where the stage never began.
    """

    name: str
    kind: str
    folder: str
    state: str
    seconds: float | None = None
    finished: str | None = None
    doing: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint: int | None = None
    why: str | None = None
    line: str | None = None
    log: str | None = None


@dataclass
class RunStatus:
    """
    Attributes:
        pipeline: Its name.
        folder: run_dir/pipeline.
        words: Of the command that goes on with it; None where no `smolpost run` wrote it down.
        stages: In the order in which they are made.
    """

    pipeline: str
    folder: str
    words: list[str] | None
    stages: list[StageStatus] = field(default_factory=list)

    @property
    def place(self) -> list[str]:
        """The word that names where it lies, if that is not where commands look by themselves."""
        run_dir = str(Path(self.folder).parent)
        return [] if run_dir == schema.Recipe.run_dir else [f"run_dir={run_dir}"]

    @property
    def next(self) -> StageStatus | None:
        """The first stage that is neither finished nor running; None while one runs."""
        if any(stage.state == "running" for stage in self.stages):
            return None
        return next((stage for stage in self.stages if stage.state != "finished"), None)

    @property
    def command(self) -> list[str] | None:
        """What makes the next stage, and the rest; None where nothing is left, or the words are not known."""
        return ["smolpost", "run", *self.words] if self.next and self.words is not None else None

    def as_json(self) -> dict:
        return asdict(self) | {"next": self.next and self.next.name, "command": self.command}


def pipeline_folders(root: Path) -> list[Path]:
    """Folders of the pipelines under a run_dir, the one that changed last at the end; or `root` where it is one.

    Raises:
        UserError: There is none.
    """
    if _is_pipeline(root):
        return [root]
    found = [folder for folder in root.glob("*") if _is_pipeline(folder)] if root.is_dir() else []
    if not found:
        what = "has no runs" if root.is_dir() else "does not exist"
        raise UserError(f"{shown(root)} {what}; name a run_dir, or run_dir/PIPELINE, or start one: `smolpost run`")
    return sorted(found, key=_changed)


def _is_pipeline(folder: Path) -> bool:
    return (folder / record.FILE).is_file() or any(
        "stage" in (manifest.read(file.parent) or {}) for file in folder.glob(f"*/{MANIFEST}")
    )


def _changed(folder: Path) -> float:
    files = [folder, *folder.glob(f"{stage_log.FOLDER}/*")]
    return max(file.stat().st_mtime for file in files)


def run_status(folder: Path) -> RunStatus:
    """A pipeline's stages as its last run listed them."""
    words, entries = record.read(folder)
    return status_of(folder, words, entries)


def planned_status(words: list[str]) -> RunStatus:
    """The stages of the recipe that the words describe, those that would be made with the reason.

    Raises:
        UserError: The recipe or its data cannot be used.
    """
    from smolpost import recipe
    from smolpost.pipeline import run
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select

    request = recipe.load(words)
    lineage = Lineage(request)
    located = [lineage.stages[plan.name] for plan in select(lineage.stages.planned.values(), request.stage)]
    found = status_of(lineage.root, record.words(request), map(record.entry, located))
    for stage, where in zip(located, found.stages, strict=True):
        if where.state == "waiting":
            _, where.why = run.status(stage)
    return found


def status_of(folder: Path, words: list[str] | None, entries: Iterable[record.Entry]) -> RunStatus:
    stages = [stage_status(entry, folder / stage_log.FOLDER / f"{entry.folder.name}.log") for entry in entries]
    return RunStatus(folder.name, str(folder), words, stages)


def stage_status(entry: record.Entry, log: Path) -> StageStatus:
    """Where a stage is."""
    found = StageStatus(entry.name, entry.kind, str(entry.folder), "waiting", log=str(log) if log.is_file() else None)
    made, last, running = manifest.read(entry.folder), stage_log.state(log), stage_log.is_held(log)
    if made:
        found.state, found.seconds, found.finished = "finished", made.get("seconds"), made.get("finished")
        if not all(results.read(folder) for folder in entry.evaluation):
            found.state, found.why = "to evaluate", "not all evaluations are there"
    if running:
        found.state, found.doing = "running", WORKING.get(last.get("command"), "starting")
        found.line = last_line(log)
        if "exit_code" in last:
            found.doing = "between two commands"
        elif last.get("command") == "train":
            _add_step(found, last)
            if found.seconds_left is not None:  # it goes on since that line
                found.seconds_left = max(0.0, found.seconds_left - _since(last["logged"]))
    elif not made and last:
        _add_end(found, last)
        _add_step(found, last)
    if not made and not running:
        steps = [int(c.name.removeprefix("checkpoint-")) for c in entry.folder.glob("checkpoint-*")]
        found.checkpoint = max(steps, default=None)
        found.state = "stopped" if steps and found.state == "waiting" else found.state
    return found


def _add_step(found: StageStatus, last: dict) -> None:
    for key in ("step", "steps", "loss", "tokens_per_second", "seconds_left"):
        setattr(found, key, last.get(key))


def _add_end(found: StageStatus, last: dict) -> None:
    """How a stage that is not made ended the last time."""
    code = last.get("exit_code")
    if code is None:
        found.state, found.why = "stopped", "its process was killed, or the machine went down"
    elif signals.is_stop(code):
        found.state, found.why = "stopped", f"by {signals.name(code)}"
    elif code:
        found.state, found.why = "failed", last.get("said") or f"exit code {code}"
    else:  # prepared, and not trained
        found.state, found.why = "stopped", f"after `{last.get('command')}`"


def last_line(log: Path) -> str | None:
    """The last line of a log that is not empty."""
    return next((line for line in reversed(tail(log, 5)) if line.strip()), None)


def tail(log: Path, number: int) -> list[str]:
    """The last lines of a file, which is read from its end."""
    block, content = 65536, b""
    with open(log, "rb") as file:
        place = file.seek(0, 2)
        while place and content.count(b"\n") <= number:
            place, size = max(0, place - block), min(place, block)
            file.seek(place)
            content = file.read(size) + content
    return content.decode(errors="replace").splitlines()[-number:] if number else []


def _since(moment: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
