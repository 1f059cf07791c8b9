"""smolpost generate: the replies of a stage's teachers, all or one part of them."""

import argparse

from smolpost.commands.words import add_words, one_stage, part, previewed, words_of
from smolpost.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)


def command(options: argparse.Namespace) -> int:
    from smolpost.pipeline import steps

    words, task = part(words_of(options))
    words, rows = previewed(words)
    if task is not None and rows is not None:
        raise UserError(f"task={task} goes with `smolpost generate`, without preview; leave it out")
    _, lineage, stage = one_stage(words)
    if rows is not None:
        steps.preview(lineage, stage, rows)
    else:
        steps.generate(lineage, stage, task)
    return 0
