"""Documentation pages as a reader uses them: the files that they show are written, their commands are typed."""

import contextlib
import functools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from smolpost import cli, recipe
from smolpost.commands.words import words_of
from smolpost.pipeline.plan import plan, select
from smolpost.stages.base import CHECKPOINT
from tests.small import ROOT, environment

PAGES = [ROOT / "README.md", ROOT / "data_gen" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("smolpost", "python", "accelerate")
NOT_OF_A_RECIPE = ("preview=", "task=", "steps=")  # words that a verb takes for itself
MACHINE = re.compile(  # what another machine or another day prints differently: keys, times, sizes, speeds
    r"(?<=-)[0-9a-f]{12}\b|\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d\S*)?|\d\d:\d\d:\d\d|"
    r"[\d.,]+ ?(?:s|min|h|MB|GB|kB|tokens/s)\b"
)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        title: The file that it shows, or None.
        not_run: Why its commands are not run here, from the comment `<!-- not run: REASON -->` above it, or None.
    """

    language: str
    title: str | None
    text: str
    not_run: str | None


class Command(NamedTuple):
    line: str
    printed: str  # what the page says that it prints; "" where the page does not show it


def blocks(page: Path) -> list[Block]:
    fenced = r"(?:<!-- not run: ([^>]*) -->\n+)?^( *)```(\w*)(?: title=\"([^\"]*)\")?\n(.*?)^\2```$"
    found = []
    for reason, indent, language, title, text in re.findall(fenced, page.read_text(), flags=re.DOTALL | re.MULTILINE):
        text = re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)
        named = re.match(r"(?:# @package _global_\n)?# ([\w./-]+\.(?:yaml|py))\b", text)
        title = title or (named[1] if named else None)
        found.append(Block(language, title, text, reason or None))
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a block: behind `$` in a console block, else the lines that begin with one of our programs."""
    text = re.sub(r"\\\n\s*", "", block.text)
    if block.language == "console":
        parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
        return [Command(line, printed) for line, _, printed in (part.partition("\n") for part in parts)]
    if block.language in ("", "sh", "bash"):
        return [Command(line, "") for line in text.splitlines() if line.split(" ")[0] in PROGRAMS]
    return []


def write_files(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)


def check_meaning(line: str, is_planned: bool) -> None:
    """The program, the verb, its options and, where it has recipe words, the pipeline and the stage exist."""
    program, first, *rest = shlex.split(line, comments=True)
    if program == "smolpost":
        if first.startswith("--"):
            return
        verb = cli.parsers([first])[1][first]  # a KeyError: there is no such verb
        options = verb.parse_intermixed_args(rest)
        words = words_of(options) if hasattr(options, "words") else []
    else:
        files = [word for word in (first, *rest) if "=" not in word and word.endswith((".py", ".yaml"))]
        assert files and all((ROOT / file).is_file() for file in files), line
        words = [word for word in rest if "=" in word]
    words = [word for word in words if "=" in word and not word.startswith(NOT_OF_A_RECIPE)]
    if is_planned and any(word.startswith("pipeline=") for word in words):
        stage = next((word.partition("=")[2] for word in words if word.startswith("stage=")), None)
        stages = _planned(tuple(word for word in words if not word.startswith("stage=")), Path.cwd())
        assert stage == CHECKPOINT or select(stages, stage), line


@functools.cache  # many commands differ in their stage alone
def _planned(words: tuple[str, ...], folder: Path) -> list:
    """The stages of a pipeline that words describe in the working directory."""
    return plan(recipe.load(list(words)))


class Reader:
    """Types commands in a folder, as a user of an installed smolpost would."""

    def __init__(self, folder: Path, tools: Path):
        """
        Args:
            folder: Where the commands run; it must be the working directory.
            tools: An empty folder, for the program `smolpost` of commands that need a shell.
        """
        self.folder = folder
        program = tools / "smolpost"
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m smolpost.cli "$@"\n')
        program.chmod(0o755)
        self.environment = environment() | {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "100",
        }  # fmt: skip

    def type(self, line: str) -> tuple[int, str]:
        """The exit code and everything that is printed."""
        words = shlex.split(line, comments=True)
        in_a_shell = words[0] != "smolpost" or bool({"|", "<", ">", "&&"} & set(words)) or "*" in line
        with tempfile.TemporaryFile("w+") as output:
            if in_a_shell or words[1] == "run":  # run forks itself: not a process that has run torch
                done = subprocess.run(
                    ["bash", "-c", line], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
                    stdout=output, stderr=subprocess.STDOUT, timeout=500,
                )  # fmt: skip
                code = done.returncode
            else:
                with _printing_to(output):
                    code = _in_process(words[1:])
            output.seek(0)
            return code, output.read()

    def check(self, command: Command) -> None:
        code, output = self.type(command.line)
        refused = command.printed.startswith("smolpost: ")
        assert code == (2 if refused else 0), f"$ {command.line}\n{output}"
        if command.printed:
            assert is_shown(command.printed, output), (
                f"$ {command.line}\n{output}\n--- the page says\n{command.printed}"
            )


def is_shown(printed: str, output: str) -> bool:
    """Whether a page shows what was printed, in any spacing: `...` for what it leaves out, no progress bars."""
    output = "\n".join(line for line in re.split(r"[\r\n]", output) if not re.search(r"\d%\|", line))  # no bars
    parts = [r"\s+".join(map(re.escape, MACHINE.sub("#", part).split())) for part in printed.split("...")]
    expected = ".*?".join(rf"\s*{part}\s*" for part in parts)
    return re.fullmatch(expected, MACHINE.sub("#", output), re.DOTALL) is not None


def _in_process(argv: list[str]) -> int:
    try:
        cli.main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@contextlib.contextmanager
def _printing_to(file) -> Iterator[None]:
    """Python's text and that of child processes, in the order in which it comes."""
    sys.stdout.flush(), sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    try:
        with (
            open(1, "w", buffering=1, closefd=False) as out,
            open(2, "w", buffering=1, closefd=False) as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            yield
    finally:
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
