"""The command line: smolpost <verb> [key=value ...]."""

import argparse
import contextlib
import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from smolpost import __version__
from smolpost.errors import UserError

VERBS = {
    "plan": "print the stages with their settings and exact commands; runs nothing",
    "run": "run the pipeline, or one stage and what it needs; skips what is finished, continues what was cut",
    "init": "make the start checkpoint: tokenizer from the data, random weights",
    "prepare": "tokenize, mask and pack a training stage's rows",
    "inspect": "show prepared rows token by token: what trains, what does not, and why",
    "doctor": "check a training stage's model, template and data on a sample of its rows",
    "evaluate": "measure a stage's model",
    "adopt": "check a checkpoint folder from elsewhere and write its manifest",
}
EPILOG = """Words are Hydra overrides: pipeline=, model=, data= and accelerate=NAME choose files under recipes/;
stage=NAME chooses a stage; every other field by its full key, e.g. stages.sft.learning_rate=1e-4."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """The one place where a user's mistake, a full disk and ctrl-C become a line and an exit code."""
    try:
        yield
    except UserError as error:
        print(f"smolpost: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("smolpost: stopped; the same command continues here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _disk_full(error):
            raise
        where = getattr(error, "filename", None) or Path.cwd()
        print(
            f"smolpost: no space left on the disk of {where}; free some, or set run_dir=FOLDER elsewhere",
            file=sys.stderr,
        )
        sys.exit(2)


def _disk_full(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="smolpost", description=__doc__, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text, epilog=EPILOG)
        if verb == "adopt":
            sub.add_argument("folder", type=Path)
            continue
        sub.add_argument("words", nargs="*", metavar="FOLDER or key=value" if verb == "inspect" else "key=value")
        if verb == "inspect":
            sub.add_argument("--source", help="only rows of this source")
            sub.add_argument("--row", help="only this row: FILE:NUMBER, or NUMBER with --source")
            sub.add_argument("--pack", type=int, help="this pack or pair, from 0")
            sub.add_argument("--limit", type=int, help="packs, pairs or documents shown; 1, and 200 in a page")
            sub.add_argument("--html", type=Path, metavar="FILE", help="write a page for a browser instead")
        if verb == "doctor":
            sub.add_argument("--rows", type=int, default=32, help="size of the sample; 32")
    options = parser.parse_args(argv)
    with one_line_errors():
        sys.exit(_do(options))


def _do(options: argparse.Namespace) -> int:
    from smolpost import recipe
    from smolpost.pipeline import run, steps
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one

    if options.verb == "adopt":
        steps.adopt(options.folder)
        return 0
    console = Console(highlight=False)
    if options.verb == "inspect":
        return _inspect(options, console)
    request = recipe.load(options.words)
    if options.verb == "plan":
        run.describe(request, console)
        return 0
    if options.verb == "run":
        return run.run(request, console)
    lineage = Lineage(request)
    stage = lineage.stages[select_one([s.plan for s in lineage.stages.values()], request.stage).name]
    if options.verb == "prepare":
        steps.prepare(lineage, stage)
    elif options.verb == "evaluate":
        steps.evaluate(lineage, stage)
    elif options.verb == "doctor":
        from smolpost.doctor import checks

        found = checks.diagnose(lineage, stage, rows=options.rows)
        console.print(checks.report(found))
        return checks.exit_code(found)
    elif stage.plan.config.kind != "init":
        raise UserError(f"stage={stage.plan.name} is a {stage.plan.config.kind} stage, not an init stage")
    else:
        steps.make(lineage, stage, lambda s, folder: steps.init(s, folder, lineage.recipe.model.architecture))
    return 0


def _inspect(options: argparse.Namespace, console: Console) -> int:
    from smolpost.report.inspect import Prepared
    from smolpost.report.page import write_page
    from smolpost.report.terminal import show

    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit} is below 1")
    prepared = Prepared(_prepared_folder(options.words))
    chosen = {"source": options.source, "row": options.row}
    if options.html is None:
        show(prepared, console, pack=options.pack, limit=options.limit or 1, **chosen)
        return 0
    if options.pack is not None:
        raise UserError("--pack is for the terminal; a page shows all packs, or those of --source and --row")
    size = write_page(prepared, options.html, limit=options.limit or 200, **chosen)
    console.print(f"{options.html}: {size / 1000:,.0f} kB; open it in a browser, ? in it lists the keys")
    return 0


def _prepared_folder(words: list[str]) -> Path:
    """The folder that is named, or that of the stage that the words choose."""
    from smolpost import recipe
    from smolpost.pipeline import manifest
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one

    if len(words) == 1 and "=" not in Path(words[0]).name:
        return Path(words[0])
    request = recipe.load(words)
    lineage = Lineage(request)
    stage = lineage.stages[select_one([s.plan for s in lineage.stages.values()], request.stage).name]
    if stage.prepared is None or not manifest.read(stage.prepared):
        raise UserError(
            f"stage={stage.plan.name} has no prepared rows; `smolpost prepare {' '.join(words)}` makes them for sft "
            "and apo stages"
        )
    return stage.prepared


def job(kind: str, fill: Callable, *, resumable: bool = False) -> None:
    """Run a script of data_gen/ or merge/ on the stage that its command line names.

    Args:
        kind: The stage kind that the script makes.
        fill: (stage, inputs, folder) -> report; writes the stage's files into the folder. Inputs are the folders of the
            checkpoints the stage starts from, by name.
        resumable: See `steps.make`.
    """
    from smolpost import recipe
    from smolpost.pipeline import steps
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one

    with one_line_errors():
        request = recipe.load(sys.argv[1:])
        lineage = Lineage(request)
        stage = lineage.stages[select_one([s.plan for s in lineage.stages.values()], request.stage).name]
        if stage.plan.config.kind != kind:
            raise UserError(
                f"stage={stage.plan.name} is a {stage.plan.config.kind} stage; this job makes {kind} stages"
            )
        steps.make(
            lineage,
            stage,
            lambda s, folder: fill(s, steps.input_folders(s, request.recipe), folder),
            resumable=resumable,
        )


if __name__ == "__main__":
    main()
