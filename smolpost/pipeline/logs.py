"""The log of a stage, found by its name, and followed while its commands write into it."""

import re
import sys
import time
from pathlib import Path

from smolpost import schema, stage_log
from smolpost.errors import UserError
from smolpost.pipeline import manifest
from smolpost.pipeline.status import tail
from smolpost.screen import shown

POLL = 0.2  # seconds between two looks at the file
NAME = re.compile(r"(.+)-[0-9a-f]{12}")  # STAGE-KEY


def log_of(stage: str, words: list[str]) -> Path:
    """The log of a stage: of the recipe that the words describe, or without pipeline= the newest one under run_dir.

    Raises:
        UserError: The stage has none, several runs have one, or it has several seeds.
    """
    if any(word.startswith("pipeline=") for word in words):
        return _planned(stage, words)
    given = [word.partition("=")[2] for word in words if word.startswith("run_dir=")]
    root = Path(given[-1] if given else schema.Recipe.run_dir)
    logs = [(match[1], log) for log in root.glob(f"*/{stage_log.FOLDER}/*.log") if (match := NAME.fullmatch(log.stem))]
    found: dict[str, list[Path]] = {}  # pipeline -> logs
    for name, log in logs:
        if name == stage:
            found.setdefault(log.parent.parent.name, []).append(log)
    if not found:
        seeds = sorted({name for name, _ in logs if re.fullmatch(rf"{re.escape(stage)}-\d+", name)})
        names = ", ".join(seeds or sorted({name for name, _ in logs}))
        choose = f"choose one of: {names}" if names else "`smolpost run` makes one for each stage"
        raise UserError(f"no run under {shown(root)} has a log of a stage {stage}; {choose}")
    if len(found) > 1:
        choices = " or ".join(f"pipeline={name}" for name in sorted(found))
        raise UserError(f"{stage} is a stage of several runs under {shown(root)}; add {choices}")
    [same] = found.values()
    return max(same, key=lambda log: log.stat().st_mtime)


def _planned(stage: str, words: list[str]) -> Path:
    from smolpost import recipe
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one

    lineage = Lineage(recipe.load(words))
    name = select_one(lineage.stages.planned.values(), stage).name
    log = lineage.log(lineage.stages[name].folder)
    if not log.is_file():
        raise UserError(f"stage {name} has not begun with these settings, so {shown(log)} is not there; run it first")
    return log


def show(log: Path, lines: int, *, follow: bool) -> None:
    """Print the last lines of a log, and with `follow` what comes to it, until its stage is finished.

    A stage that stops is waited for: it goes on in the same log.
    """
    print(f"{shown(log)}:", file=sys.stderr)
    place = log.stat().st_size
    for line in tail(log, lines):
        print(line)
    sys.stdout.flush()
    waiting = False
    while follow:
        running = stage_log.is_held(log)
        place = _print_from(log, place)
        if not running and _finished(log):
            return
        if not running and not waiting:
            print("the stage is not running; waiting until it goes on, ctrl-C ends", file=sys.stderr)
        waiting = not running
        time.sleep(POLL)


def _print_from(log: Path, place: int) -> int:
    """Print the complete lines from that byte on; the byte after them."""
    with open(log, "rb") as file:
        file.seek(place)
        content = file.read()
    content = content[: content.rfind(b"\n") + 1]
    if content:
        print(content.decode(errors="replace"), end="", flush=True)
    return place + len(content)


def _finished(log: Path) -> bool:
    """Whether the log's stage is made. Logs of evaluations alone belong to no stage: they are finished."""
    folder = log.parent.parent / log.stem
    return manifest.read(folder) is not None or stage_log.state(log).get("command") == "eval"
