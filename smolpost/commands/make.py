"""smolpost make: one stage, in this process."""

import argparse

from smolpost import screen
from smolpost.commands.words import add_words, one_stage, part, previewed, words_of
from smolpost.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)


def command(options: argparse.Namespace) -> int:
    from smolpost.pipeline import steps

    words, task = part(words_of(options))
    if task is not None:
        raise UserError(f"task={task} goes with `smolpost generate`, without preview; leave it out")
    words, rows = previewed(words)
    _, lineage, stage = one_stage(words)
    if rows is not None:
        steps.preview(lineage, stage, rows)
    elif stage.config.LAUNCHED:
        launch = screen.command_line(stage.making[-1])
        raise UserError(f"stage={stage.name} is trained by a launcher; run `{launch}`, or `smolpost run`")
    else:
        steps.make(lineage, stage)
    return 0
