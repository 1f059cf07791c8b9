"""smolpost run: a pipeline, or one stage and what it needs."""

import argparse

from smolpost import screen
from smolpost.commands.words import add_words, words_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)


def command(options: argparse.Namespace) -> int:
    from smolpost import recipe
    from smolpost.pipeline import run

    return run.run(recipe.load(words_of(options)), screen.console())
