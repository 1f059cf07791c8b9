"""What the flags of `smolpost new` leave open: asked on a terminal, refused elsewhere."""

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.prompt import Prompt

from smolpost.data.turns import ROLES
from smolpost.errors import UserError
from smolpost.starting import checkpoint, rows
from smolpost.starting.command import Asked, check_name


def asked(options: argparse.Namespace, console: Console) -> Asked:
    """What the flags and, on a terminal, the answers say.

    The checkpoint and the rows are asked for where no flag names them, LoRA and GPUs where there is no flag at all.

    Raises:
        UserError: A flag is missing, and there is no terminal.
    """
    gpus, roles = _gpus(), dict(map(_role, options.roles or []))
    found = Asked(options.name, options.checkpoint or "", options.sft or [], options.preference or [], options.lora,
                  gpus if options.gpus is None else options.gpus, roles)  # fmt: skip
    missing = [] if found.checkpoint else ["--checkpoint MODEL"]
    missing += [] if found.sft or found.preference else ["--sft FILE or --preference FILE"]
    if not missing:
        return found
    if not sys.stdin.isatty():
        raise UserError(f"smolpost new needs {' and '.join(missing)} where no terminal can ask for it")
    check_name(found.name)
    no_flags = not (found.checkpoint or found.sft or found.preference or options.lora or options.gpus is not None)
    if not found.checkpoint:
        found.checkpoint = _answer(console, "Checkpoint to train (folder or Hub id)", _checkpoint)
    while not (found.sft or found.preference):
        found.sft = _answer(console, "Files of conversations for SFT (empty: none)", _files("documents", roles))
        found.preference = _answer(console, "Files of preference pairs (empty: none)", _files("pairs", roles))
        if not (found.sft or found.preference):
            console.print("There is nothing to train on: name one file at least.")
    if no_flags:
        found.lora = _answer(console, "Train low-rank adapters (LoRA) instead of all weights? y or n", _yes, "n")
        found.gpus = _answer(console, "GPUs that train (1 for a CPU, too)", _number, str(gpus))
    return found


def _answer(console: Console, question: str, read: Callable[[str], Any], default: str = "") -> Any:
    """The answer as `read` gives it; asked again where it raises UserError."""
    while True:
        try:
            text = Prompt.ask(question, console=console, default=default, show_default=bool(default)).strip()
        except EOFError:
            raise UserError(f"{question}: no answer; nothing was written") from None
        try:
            return read(text)
        except UserError as error:
            console.print(str(error), soft_wrap=True)


def _checkpoint(text: str) -> str:
    if not text:
        raise UserError("Name a folder with config.json, weights and tokenizer, or a model on the Hub.")
    checkpoint.look(text)
    return text


def _files(layout: str, roles: dict[str, str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        try:
            paths = shlex.split(text)
        except ValueError as error:  # a quotation mark without its other one
            raise UserError(f"{text}: {error}; quote names with spaces") from None
        for path in paths:
            rows.look(path, layout, "rows", roles)
        return paths

    return read


def _role(text: str) -> tuple[str, str]:
    theirs, _, ours = text.partition("=")
    if not theirs or ours not in ROLES:
        raise UserError(f"--roles {text} is not NAME=ROLE; ROLE is one of {', '.join(ROLES)}")
    return theirs, ours


def _yes(text: str) -> bool:
    if text.lower() not in ("y", "yes", "n", "no"):
        raise UserError(f"{text} is neither y nor n")
    return text.lower() in ("y", "yes")


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UserError(f"{text} is not a number of GPUs; give 1 or more")
    return int(text)


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())
