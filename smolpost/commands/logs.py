"""smolpost logs: what a stage's commands have printed."""

import argparse
import os
import sys

from smolpost import signals
from smolpost.commands.words import add_recipes
from smolpost.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", metavar="STAGE", help="its name, with its seed where it has several")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("-f", "--follow", action="store_true", help="print new lines until the stage is finished")
    parser.add_argument("-n", "--lines", type=int, default=50, help="print the last LINES lines; default 50")
    add_recipes(parser)


def command(options: argparse.Namespace) -> int:
    from smolpost.pipeline import logs

    if options.lines < 0:
        raise UserError(f"--lines {options.lines} is not a number of lines; give one from 0, such as --lines 50")
    if "=" in options.stage:
        raise UserError(f"{options.stage} is not a stage; name the stage first: smolpost logs STAGE {options.stage}")
    words = [*(f"--recipes={folder}" for folder in options.recipes), *options.words]
    try:
        logs.show(logs.log_of(options.stage, words), options.lines, follow=options.follow)
    except signals.Stopped as stop:  # the way to end it: nothing to say
        return signals.exit_code(stop.signum)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
