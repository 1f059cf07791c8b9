"""smolpost sample: the same prompts through several models, as one page."""

import argparse
from pathlib import Path

from smolpost import screen
from smolpost.commands.words import add_words, named_models, words_of
from smolpost.errors import UserError
from smolpost.synthesis.settings import SERVERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, "MODEL or key=value")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="a .txt file with a prompt on each line, or JSONL rows; default: twelve prompts of our own",
    )  # fmt: skip
    parser.add_argument(
        "--html", type=Path, metavar="FILE", default=Path("samples.html"), help="the page; default: samples.html"
    )
    parser.add_argument("--temperature", type=float, default=0.6, help="0 takes the likeliest token; default: 0.6")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: 0.95")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest reply; default: 1024")
    parser.add_argument("--num-samples", type=int, default=1, help="replies to each prompt in each mode; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--template", metavar="NAME", help="chat template for the checkpoints, in place of each one's own"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="prompts that a checkpoint answers at once")
    parser.add_argument("--model", metavar="NAME", help="what a server is asked for, if it serves several models")
    parser.add_argument("--server", choices=SERVERS, help="kind of the servers; default: found out")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the servers' key")


def command(options: argparse.Namespace) -> int:
    _check(options)
    names, words = named_models(words_of(options))
    if not names:
        raise UserError("sample needs a model: name stages, checkpoint folders or the URLs of servers")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{repeated[0]} is named twice; name each model once")
    from smolpost.pipeline.models import model_named
    from smolpost.pipeline.sample import Settings, sample
    from smolpost.pipeline.sample_prompts import read_prompts, shipped_prompts
    from smolpost.report.html import check_is_ours
    from smolpost.report.replies import facts_table, shown_replies
    from smolpost.report.replies_page import write_replies_page

    check_is_ours(options.html, "sample")
    prompts = read_prompts(options.prompts or shipped_prompts())
    models = [model_named(name, words) for name in names]
    settings = Settings(**{name: getattr(options, name) for name in Settings._fields})
    kept = options.html.with_suffix(".replies.jsonl")
    columns = sample(models, prompts, settings, kept)
    replies = shown_replies(columns, prompts)
    size = write_replies_page(columns, prompts, replies, settings.shown(), options.html)
    console = screen.console()
    console.print(facts_table(one for found in replies.values() for one in found))
    console.print(
        f"{options.html}: {size / 1000:,.0f} kB; open it in a browser, ? in it lists the keys", soft_wrap=True
    )
    console.print(f"{kept}: the replies; remove it to ask again", soft_wrap=True)
    return 0


def _check(options: argparse.Namespace) -> None:
    limits = {
        "temperature": (0, float("inf"), "[0, inf)"), "top_p": (1e-9, 1, "(0, 1]"),
        **dict.fromkeys(("max_new_tokens", "num_samples", "batch_size"), (1, float("inf"), "[1, inf)")),
        "seed": (0, 2**63 - 1, "[0, 2^63)"),
    }  # fmt: skip
    for name, (least, most, interval) in limits.items():
        value = getattr(options, name)
        if not least <= value <= most or value == float("inf"):
            raise UserError(f"--{name.replace('_', '-')}={value:g} is outside {interval}")
