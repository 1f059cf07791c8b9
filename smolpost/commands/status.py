"""smolpost status: runs, their stages, where they are and what is next."""

import argparse
import json
import textwrap
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from smolpost import schema, screen
from smolpost.commands.words import add_words, words_of
from smolpost.errors import UserError
from smolpost.progress import duration, plural
from smolpost.screen import command_line

if TYPE_CHECKING:
    from smolpost.pipeline.status import RunStatus, StageStatus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, metavar="RUN_DIR | key=value")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each run instead")


def command(options: argparse.Namespace) -> int:
    runs, width = _asked(words_of(options)), screen.console().width
    for number, run in enumerate(runs):
        if options.json:
            print(json.dumps(run.as_json()))
        else:
            print(*([""] if number else []), *_lines(run, width), sep="\n")
    return 0


def _asked(words: list[str]) -> list["RunStatus"]:
    from smolpost.pipeline import status

    folders = [word for word in words if "=" not in word]
    settings = [word for word in words if "=" in word]
    if any(word.startswith("pipeline=") for word in settings):
        if folders:
            raise UserError(f"{folders[0]} is a folder beside pipeline=; write run_dir={folders[0]}")
        return [status.planned_status(settings)]
    places = [*folders, *(word.removeprefix("run_dir=") for word in settings if word.startswith("run_dir="))]
    if len(places) > 1:
        raise UserError(f"{' and '.join(places)} are two places; name one run_dir")
    if other := [word for word in settings if not word.startswith("run_dir=")]:
        raise UserError(f"{other[0]} is a word of a recipe; add pipeline=NAME, or leave it out")
    root = Path(places[0] if places else schema.Recipe.run_dir)
    return [status.run_status(folder) for folder in status.pipeline_folders(root)]


def _lines(run: "RunStatus", width: int) -> Iterator[str]:
    done = sum(stage.state == "finished" for stage in run.stages)
    yield f"{run.pipeline}: {done} of {len(run.stages)} {plural('stage', len(run.stages))} finished, in {run.folder}"
    names = max((len(stage.name) for stage in run.stages), default=0)
    states = max((len(stage.doing or stage.state) for stage in run.stages), default=0)
    for stage in run.stages:
        before = f"  {stage.name:{names}}  {stage.doing or stage.state:{states}}  "
        after = textwrap.wrap(", ".join(_details(stage)), max(30, width - len(before)), break_long_words=False)
        yield (before + (after[0] if after else "")).rstrip()
        yield from (" " * len(before) + line for line in after[1:])
    for stage in run.stages:
        if stage.state == "running" and stage.log:
            yield f"follow it: `{command_line(['smolpost', 'logs', stage.name, '--follow', *run.place])}`"
    if run.next:
        yield f"next: {run.next.name}" + (f", by `{command_line(run.command)}`" if run.command else "")


def _details(stage: "StageStatus") -> Iterator[str]:
    if stage.state == "finished":
        if stage.finished:
            yield f"{datetime.fromisoformat(stage.finished):%Y-%m-%d %H:%M} UTC"
        if stage.seconds is not None:
            yield f"took {duration(stage.seconds)}"
        return
    if stage.step is not None:
        yield f"step {stage.step:,} of {stage.steps:,}"
        yield f"loss {stage.loss:.4g}"
    if stage.why:
        yield stage.why
    if stage.checkpoint is not None:
        yield f"goes on from step {stage.checkpoint:,}"
    if stage.state == "running":
        if stage.tokens_per_second is not None:
            yield f"{stage.tokens_per_second:,.0f} tokens/s"
        if stage.seconds_left is not None:
            yield f"about {duration(stage.seconds_left)} left"
        if stage.step is None and stage.line and not stage.line.startswith("---"):
            yield stage.line.strip()
