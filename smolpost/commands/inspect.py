"""smolpost inspect: prepared rows token by token, or synthetic data with its verdicts."""

import argparse
from pathlib import Path

from rich.console import Console

from smolpost import screen
from smolpost.commands.words import add_words, words_of
from smolpost.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, "FOLDER or key=value")
    parser.add_argument("--source", help="show only rows of this source")
    parser.add_argument("--row", help="show only this row: FILE:NUMBER, or NUMBER with --source; or the id of a prompt")
    parser.add_argument("--pack", type=int, help="show only this pack or pair, counted from 0")
    parser.add_argument("--limit", type=int, help="packs, pairs, documents or prompts to show")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page for a browser instead")


def command(options: argparse.Namespace) -> int:
    from smolpost.report.inspect import Prepared
    from smolpost.report.page import write_page
    from smolpost.report.samples import is_generated
    from smolpost.report.terminal import show

    console = screen.console()
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit} is below 1")
    folder = _inspected_folder(words_of(options))
    if is_generated(folder):
        return _inspect_samples(folder, options, console)
    prepared = Prepared(folder)
    chosen = {"source": options.source, "row": options.row}
    if options.html is None:
        show(prepared, console, pack=options.pack, limit=options.limit or 1, **chosen)
        return 0
    if options.pack is not None:
        raise UserError("--pack is for the terminal; a page shows all packs, or those of --source and --row")
    _written(options.html, write_page(prepared, options.html, limit=options.limit or 200, **chosen), console)
    return 0


def _inspect_samples(folder: Path, options: argparse.Namespace, console: Console) -> int:
    """Show synthetic data; --row is the id of a prompt there."""
    from smolpost.report.samples import Samples
    from smolpost.report.samples_page import write_samples_page
    from smolpost.report.show_samples import show_samples

    if options.pack is not None:
        raise UserError(f"--pack is for prepared rows, and {folder} holds synthetic data; --row ID shows one prompt")
    samples, chosen = Samples(folder), {"source": options.source, "identity": options.row}
    if options.html is None:
        show_samples(samples, console, limit=options.limit or 5, **chosen)
    else:
        size = write_samples_page(samples, options.html, limit=options.limit or 200, **chosen)
        _written(options.html, size, console)
    return 0


def _written(page: Path, size: int, console: Console) -> None:
    console.print(f"{page}: {size / 1000:,.0f} kB; open it in a browser, ? in it lists the keys", soft_wrap=True)


def _inspected_folder(words: list[str]) -> Path:
    """The folder that is named, or that of the stage that the words choose: its synthetic data or its prepared rows."""
    from smolpost import recipe
    from smolpost.pipeline import manifest
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one
    from smolpost.report.samples import is_generated

    if len(words) == 1 and "=" not in Path(words[0]).name:
        return Path(words[0])
    request = recipe.load(words)
    lineage = Lineage(request)
    stage = lineage.stages[select_one(lineage.stages.planned.values(), request.stage).name]
    if stage.finished() and is_generated(stage.folder):
        return stage.folder
    if stage.replies:
        run = screen.command_line(["smolpost", "run", *words])
        raise UserError(f"stage={stage.name} has no rows yet; `{run}` makes them")
    if stage.prepared is None or not manifest.read(stage.prepared):
        make = screen.command_line(["smolpost", "prepare", *words])
        raise UserError(f"stage={stage.name} has no prepared rows; `{make}` makes those of a training stage")
    return stage.prepared
