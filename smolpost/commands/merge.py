"""smolpost merge: checkpoints merged from the command line."""

import argparse

from smolpost.merging.command import add_arguments as add_arguments
from smolpost.merging.command import merge_command


def command(options: argparse.Namespace) -> int:
    return merge_command(**{name: value for name, value in vars(options).items() if name != "verb"})
