"""smolpost doctor: checks of a training stage before it trains."""

import argparse

from smolpost import screen
from smolpost.commands.words import add_words, one_stage, words_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)
    parser.add_argument("--rows", type=int, default=32, help="rows in the sample; default 32")
    parser.add_argument("--against", choices=["trl"], help="compare the first steps by our engine and by TRL's")


def command(options: argparse.Namespace) -> int:
    _, lineage, stage = one_stage(words_of(options))
    console = screen.console()
    if options.against:
        from smolpost.doctor import two_engines

        compared = two_engines.compare_engines(lineage, stage, rows=options.rows)
        console.print(two_engines.report(compared))
        return two_engines.exit_code(compared)
    from smolpost.doctor import checks

    found = checks.diagnose(lineage, stage, rows=options.rows)
    console.print(checks.report(found))
    return checks.exit_code(found)
