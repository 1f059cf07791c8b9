"""smolpost import: a pipeline from another tool's YAML file."""

import argparse

from smolpost.importing.command import add_arguments as add_arguments
from smolpost.importing.command import import_command


def command(options: argparse.Namespace) -> int:
    return import_command(**{name: value for name, value in vars(options).items() if name != "verb"})
