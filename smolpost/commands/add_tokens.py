"""smolpost add-tokens: a copy of a checkpoint that has the control tokens of a chat template."""

import argparse
from pathlib import Path

from smolpost.errors import UserError
from smolpost.screen import command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, or a name on the Hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument(
        "--template", metavar="NAME", help="chat template that needs the tokens: smollm3, chatml, or a .jinja file"
    )
    parser.add_argument("--tokens", nargs="+", default=[], metavar="TOKEN", help="further tokens")
    parser.add_argument(
        "--pad-to-multiple-of",
        type=int,
        default=1,
        metavar="N",
        help="rows of the embedding are a multiple of N, e.g. 64; default 1",
    )


def command(options: argparse.Namespace) -> int:
    from smolpost.pipeline.added_tokens import add_tokens

    if not options.template and not options.tokens:
        raise UserError("add-tokens needs --template NAME or --tokens TOKEN ...; for example --template smollm3")
    multiple = options.pad_to_multiple_of
    if multiple < 1:
        raise UserError(f"--pad-to-multiple-of {multiple} is below 1; leave it out, or give 64")
    report = add_tokens(
        options.checkpoint, options.out, template=options.template, tokens=options.tokens, multiple=multiple
    )
    size, stops = report["vocab_size"], report["stop_tokens"]
    print(f"{options.out}: {len(report['tokens'])} tokens added, each with the mean of the old rows")
    print("  " + ", ".join(f"{token} {i}" for token, i in report["tokens"].items()))
    print(f"  rows of the embedding: {size['before']:,} -> {size['after']:,}")
    if stops["before"] != stops["after"]:
        print(f"  generation stops at {stops['after']} (before: {stops['before']})")
    start = command_line([f"model.checkpoint={options.out}"])
    print(f"a pipeline starts from it with {start}; the new rows are untrained: train them before you merge or sample")
    return 0
