"""smolpost push: a finished stage for others. Without --yes it says what it would write."""

import argparse
from pathlib import Path

from smolpost import screen
from smolpost.commands.words import add_words, words_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", metavar="STAGE", help="a finished stage by its folder or name: a model or rows")
    parser.add_argument("target", metavar="TARGET", help="OWNER/NAME on the Hub, or s3://..., file:///...")
    add_words(parser)
    parser.add_argument("--yes", action="store_true", help="write; without it, show what would be written")
    parser.add_argument("--check", action="store_true", help="also look at what the target holds")
    parser.add_argument("--license", metavar="ID", help="for the card's header, such as apache-2.0")
    parser.add_argument("--card", type=Path, metavar="FILE", help="your own README.md; `smolpost card` writes a draft")
    parser.add_argument("--no-provenance", action="store_true", help="leave out the teachers' raw replies")
    parser.add_argument("--replace", action="store_true", help="replace another push that the target holds")
    parser.add_argument("--public", action="store_true", help="a repository of the Hub that all can read")


def command(options: argparse.Namespace) -> int:
    from smolpost.pipeline.models import finished_folder
    from smolpost.publish import push

    folder = finished_folder(options.stage, words_of(options))
    package = push.package(
        folder,
        options.target,
        with_provenance=not options.no_provenance,
        license_id=options.license,
        card_file=options.card,
    )
    place = push.place_of(options.target, package, public=options.public)
    console = screen.console()
    if options.yes:
        console.print(push.push(package, place, replace=options.replace), soft_wrap=True)
        return 0
    for line in push.described(folder, package, place):
        console.print(line, soft_wrap=True)
    if options.check:
        console.print(push.check(package, place, replace=options.replace), soft_wrap=True)
    asked = "" if options.check else " and nobody was asked; --check looks at the target"
    console.print(f"nothing was written{asked}; --yes pushes", soft_wrap=True)
    return 0
