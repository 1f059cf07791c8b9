"""smolpost plan: what a pipeline will do, and why."""

import argparse

from smolpost import screen
from smolpost.commands.words import add_words, words_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)
    parser.add_argument("--cfg", choices=["job"], help="print the composed recipe as YAML instead")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: print values of interpolations")
    parser.add_argument("--fidelity", action="store_true", help="compare the values with those that are published")


def command(options: argparse.Namespace) -> int:
    from smolpost import recipe
    from smolpost.pipeline import run

    words = words_of(options)
    if options.cfg:
        print(recipe.as_yaml(words, resolve=options.resolve), end="")
        return 0
    request = recipe.load(words)
    if options.fidelity:
        return _fidelity(request)
    run.describe(request, screen.console())
    return 0


def _fidelity(request) -> int:
    from smolpost.fidelity.show import terminal
    from smolpost.fidelity.table import sections
    from smolpost.pipeline.plan import plan, select

    console = screen.console()
    asked = select(plan(request), request.stage)
    for part in terminal(sections(request.recipe, list(dict.fromkeys(stage.entry for stage in asked)))):
        console.print(part)
    return 0
