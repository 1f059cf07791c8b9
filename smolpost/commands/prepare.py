"""smolpost prepare: the rows of a training stage."""

import argparse

from smolpost.commands.words import add_words, one_stage, words_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)


def command(options: argparse.Namespace) -> int:
    from smolpost.pipeline import steps

    _, lineage, stage = one_stage(words_of(options))
    steps.prepare(lineage, stage)
    return 0
