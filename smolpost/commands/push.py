"""smolpost push: a stage's synthetic rows for others."""

import argparse
from pathlib import Path

from smolpost import screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", metavar="OWNER/NAME or URL", help="dataset of the Hub, or s3://..., file:///...")
    parser.add_argument("--no-provenance", action="store_true", help="leave out the teachers' raw replies")
    parser.add_argument("--replace", action="store_true", help="replace other rows that were pushed there")
    parser.add_argument("--public", action="store_true", help="a dataset of the Hub that all can read")


def command(options: argparse.Namespace) -> int:
    from smolpost.synthesis.push import push

    line = push(
        options.folder,
        options.target,
        with_provenance=not options.no_provenance,
        replace=options.replace,
        public=options.public,
    )
    screen.console().print(line, soft_wrap=True)
    return 0
