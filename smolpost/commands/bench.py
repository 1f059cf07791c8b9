"""smolpost bench: speed and memory of a training stage."""

import argparse

from smolpost import screen
from smolpost.commands.words import add_words, taken, words_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)


def command(options: argparse.Namespace) -> int:
    from smolpost import recipe
    from smolpost.pipeline.bench import bench

    words, steps = taken(words_of(options), "steps", "a number of optimizer steps", 1, 20)
    return bench(recipe.load(words), 20 if steps is None else steps, screen.console())
