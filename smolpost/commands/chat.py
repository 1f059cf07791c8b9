"""smolpost chat: talk to a model, or to two side by side."""

import argparse
import os
import signal
import sys
from pathlib import Path

from smolpost import screen, signals
from smolpost.commands.words import add_words, named_models, words_of
from smolpost.errors import UserError
from smolpost.synthesis.settings import SERVERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser, "MODEL [MODEL2] or key=value")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    parser.add_argument("--no-think", action="store_true", help="begin with /no_think")
    parser.add_argument("--temperature", metavar="NUMBER", help="0: the likeliest token each time")
    parser.add_argument("--top-p", metavar="NUMBER", help="share of the probability that is sampled from")
    parser.add_argument("--max-new-tokens", metavar="NUMBER", help="longest reply, thinking included")
    parser.add_argument(
        "--seed", metavar="NUMBER", help="of the replies' random numbers; default: another one each time"
    )
    parser.add_argument("--tools", type=Path, metavar="FILE", help="JSON file of functions that the model may call")
    parser.add_argument("--save", type=Path, metavar="FILE", help="JSONL file for the conversation, as rows that train")
    parser.add_argument("--template", metavar="NAME", help="chat template instead of the checkpoint's own")
    parser.add_argument("--model", action="append", default=[], metavar="NAME", help="of those that a server has")
    parser.add_argument("--server", choices=SERVERS, help="kind of a server; default: found out")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with a server's key")


def command(options: argparse.Namespace) -> int:
    from smolpost.talk.conversation import read_tools
    from smolpost.talk.saved import SavedRow
    from smolpost.talk.session import Session
    from smolpost.talk.settings import Settings, changed
    from smolpost.talk.view import Plain, Terminal

    names, words = named_models(words_of(options))
    if not 1 <= len(names) <= 2:
        found = f"{len(names)} were named" if names else "none was named"
        raise UserError(f"chat takes one model or two, and {found}; name a stage, a folder or a server's URL")
    given = [
        f"{name}={value}"
        for name in ("temperature", "top_p", "max_new_tokens", "seed")
        if (value := getattr(options, name)) is not None
    ]
    changed(Settings(), given)  # a wrong value is told before a model is loaded
    if options.save:
        SavedRow(options.save)
    tools = {} if options.tools is None else {"tools": read_tools(options.tools)}
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    view = Terminal(screen.console()) if in_terminal else Plain()
    speakers = _speakers(names, words, options)
    own = next((speaker.settings for speaker in speakers if speaker.settings), Settings())
    session = Session(
        speakers,
        view,
        changed(own, given),
        thinking=False if options.no_think else None,
        system=options.system,
        save=options.save,
        **tools,
    )
    if in_terminal:
        lines = [*(speaker.about for speaker in speakers), str(session.settings), "/help lists the commands"]
        view.note("\n".join(lines))
    try:
        session.run()
    except signals.Stopped as stop:
        if stop.signum != signal.SIGINT or not in_terminal:
            return signals.exit_code(stop.signum)
        print()  # ctrl-C at the prompt; a reply takes it for itself
    except BrokenPipeError:  # who reads the replies has read enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's last flush fails
        return signals.exit_code(signal.SIGPIPE)
    return 0


def _speakers(names: list[str], words: list[str], options: argparse.Namespace) -> list:
    """The models, which are all named rightly before the first one is loaded."""
    from smolpost.pipeline.models import model_named
    from smolpost.talk.served import ServedSpeaker

    named = [model_named(name, words) for name in names]
    _check_flags(options, len(named), sum(one.url is not None for one in named))
    wanted, speakers = iter(options.model), []
    for one in named:
        if one.url:
            speakers.append(ServedSpeaker(one.url, next(wanted, None), options.server, options.api_key_env))
            continue
        from smolpost.talk.local import load

        print(f"loading {one.name} ...", file=sys.stderr, flush=True)
        speakers.append(load(one.name, one.folder, options.template))
    return speakers


def _check_flags(options: argparse.Namespace, num_models: int, num_servers: int) -> None:
    """
    Raises:
        UserError: A flag would have no effect.
    """
    if num_servers < len(options.model):
        raise UserError(f"--model {options.model[-1]} chooses among a server's models, and no further server is named")
    if num_servers == 0 and (flag := options.server or options.api_key_env):
        name = "--server" if options.server else "--api-key-env"
        raise UserError(f"{name} {flag} is for a server's URL, and none is named; leave it out")
    if options.template and num_servers == num_models:
        raise UserError(
            f"--template {options.template} is for a checkpoint, and a server renders its prompts itself; leave it out"
        )
