"""smolpost doctor: checks of a training stage before it trains, or of the installation and the machine."""

import argparse
from pathlib import Path

from smolpost import screen
from smolpost.commands.words import add_words, one_stage, words_of
from smolpost.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)
    parser.add_argument("--rows", type=int, default=32, help="rows in the sample; default 32")
    parser.add_argument("--against", choices=["trl"], help="compare the first steps by our engine and by TRL's")
    parser.add_argument("--environment", action="store_true", help="look at the installation and the machine instead")
    parser.add_argument("--json", action="store_true", help="with --environment: print the findings as JSON")
    parser.add_argument("--network", action="store_true", help="with --environment: also ask whether the Hub answers")


def command(options: argparse.Namespace) -> int:
    if options.environment:
        return _environment(options)
    if options.json or options.network:
        raise UserError(f"--{'json' if options.json else 'network'} goes with --environment; leave it out, or add that")
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


def _environment(options: argparse.Namespace) -> int:
    import json

    from smolpost import schema
    from smolpost.doctor import environment

    if others := [word for word in words_of(options) if not word.startswith("run_dir=")]:
        raise UserError(f"{others[0]} does not go with --environment, which looks at no stage; it takes run_dir=FOLDER")
    if options.against:
        raise UserError("--against compares the engines of a stage; leave it or --environment out")
    run_dir = [word.partition("=")[2] for word in options.words] or [schema.Recipe.run_dir]
    found = environment.examine(Path(run_dir[-1]), network=options.network)
    if options.json:
        print(json.dumps([finding._asdict() for finding in found], indent=2))
    else:
        screen.console().print(environment.report(found))
    return environment.exit_code(found)
