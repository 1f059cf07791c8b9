"""smolpost adopt: a checkpoint folder from elsewhere, checked and hashed."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)


def command(options: argparse.Namespace) -> int:
    from smolpost.pipeline import steps

    steps.adopt(options.folder)
    return 0
