"""smolpost serve: the command that serves a teacher, a stage's model or a checkpoint folder."""

import argparse
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from smolpost import screen
from smolpost.chat.render import template_file
from smolpost.commands.words import add_recipes
from smolpost.errors import UserError
from smolpost.synthesis.serve import OWN_SERVERS, notes, positions, program, serve_command
from smolpost.synthesis.settings import Teacher

PORTS = range(1, 65536)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a stage, a checkpoint folder, a GGUF file or a file of recipes/teacher"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="such as pipeline=NAME, to find the stage")
    parser.add_argument("--server", choices=OWN_SERVERS, help="default: vllm, or what the teacher's recipe names")
    parser.add_argument("--port", type=int, help="default: 8000, or that of the teacher's url")
    parser.add_argument("--chat-template", metavar="NAME", help="in place of the model's own: a name or a .jinja file")
    parser.add_argument("--run", action="store_true", help="run the command here, in the foreground")
    add_recipes(parser)


def command(options: argparse.Namespace) -> int:
    if options.port is not None and options.port not in PORTS:
        raise UserError(f"--port={options.port} is outside [{PORTS[0]}, {PORTS[-1]}]")
    template = template_file(options.chat_template) if options.chat_template else None
    teacher, name = _served(options)
    chosen = teacher.server
    teacher.server = options.server or chosen
    if options.port is not None:
        teacher.url = f"http://{urlsplit(teacher.url or '').hostname or 'localhost'}:{options.port}/v1"
    words = serve_command(teacher, name=name, template=template)
    for line in notes(teacher, chosen, template):
        print(f"smolpost: {line}", file=sys.stderr)
    print(screen.command_line(words), flush=True)
    if options.run:
        os.execv(program(teacher.server, words[0]), words)
    return 0


def _served(options: argparse.Namespace) -> tuple[Teacher, str | None]:
    """The teacher of a recipe, or a model of ours as one; and the name of a stage, by which clients may ask for it."""
    from smolpost import recipe
    from smolpost.pipeline.models import UnknownModel, model_named
    from smolpost.recipe.places import Places

    words = [*(f"--recipes={folder}" for folder in options.recipes), *options.settings]
    is_planned = any(word.startswith("pipeline=") for word in words)
    if not is_planned and options.model in Places.of(options.recipes, None).options("teacher"):
        return recipe.teacher(options.model, options.recipes), None
    if options.model.endswith(".gguf") and Path(options.model).is_file():
        if options.server not in (None, "llama_cpp"):
            raise UserError(f"--server {options.server} does not read GGUF files; leave it out, or name a checkpoint")
        return Teacher(model=options.model, server="llama_cpp"), None
    try:
        named = model_named(options.model, words)
    except UnknownModel:
        if options.settings:
            raise
        return recipe.teacher(options.model, options.recipes), None  # says which teachers there are
    if named.url:
        raise UserError(f"{named.url} is a server already; `smolpost chat {named.url}` talks to it")
    context = positions(named.folder)
    teacher = Teacher(model=str(named.folder), **({"max_new_tokens": context} if context else {}))
    teacher.server = options.server or teacher.server  # no recipe says another one
    return teacher, None if named.name == options.model == str(named.folder) else named.name
