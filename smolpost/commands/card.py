"""smolpost card: the card of a finished stage, which push writes as README.md."""

import argparse

from smolpost.commands.words import add_words, words_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", metavar="STAGE", help="a finished stage by its folder or name: a model or rows")
    add_words(parser)
    parser.add_argument("--license", metavar="ID", help="for the card's header, such as apache-2.0")


def command(options: argparse.Namespace) -> int:
    from smolpost.pipeline.models import finished_folder
    from smolpost.publish.push import package

    folder = finished_folder(options.stage, words_of(options))
    print(package(folder, license_id=options.license).card, end="")
    return 0
