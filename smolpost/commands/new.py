"""smolpost new: a first pipeline for a checkpoint and rows of the user's own."""

import argparse
from pathlib import Path

from smolpost import screen
from smolpost.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="of the pipeline; it is written to NAME.yaml in the current folder"
    )
    parser.add_argument("--checkpoint", metavar="MODEL", help="folder or Hub id of the model to train")
    parser.add_argument("--sft", nargs="+", action="extend", metavar="FILE", help="conversations: JSONL, JSON, Parquet")
    parser.add_argument(
        "--preference", nargs="+", action="extend", metavar="FILE", help="pairs of a chosen and a rejected reply"
    )
    parser.add_argument(
        "--roles",
        nargs="+",
        action="extend",
        metavar="NAME=ROLE",
        help="roles with names of their own, as bot=assistant",
    )
    parser.add_argument("--lora", action="store_true", help="train low-rank adapters instead of all weights")
    parser.add_argument("--gpus", type=int, metavar="N", help="that train; default: those of this machine")


def command(options: argparse.Namespace) -> int:
    from smolpost.starting.command import new
    from smolpost.starting.questions import asked

    if options.name is None:
        options.name = _name_after_files(options)
    console = screen.console()
    new(asked(options, console), console)
    return 0


def _name_after_files(options: argparse.Namespace) -> str:
    """NAME where it comes last, after the files of a flag, which takes it for one of them.

    Raises:
        UserError: There is none.
    """
    for files in (options.sft, options.preference):
        if files and len(files) > 1 and not Path(files[-1]).exists() and not Path(files[-1]).suffix:
            return files.pop()
    raise UserError("new needs a NAME for the pipeline, such as `smolpost new mine`; it writes NAME.yaml here")
