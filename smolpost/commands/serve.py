"""smolpost serve: the command that serves a teacher."""

import argparse
import os
import sys
from pathlib import Path

from smolpost import screen
from smolpost.commands.words import add_recipes
from smolpost.synthesis.serve import OWN_SERVERS, notes, program, serve_command
from smolpost.synthesis.settings import Teacher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", metavar="TEACHER", help="a file of recipes/teacher, or a checkpoint folder")
    parser.add_argument("--server", choices=OWN_SERVERS, help="instead of the one that the teacher's recipe names")
    parser.add_argument("--run", action="store_true", help="run the command here, in the foreground")
    add_recipes(parser)


def command(options: argparse.Namespace) -> int:
    from smolpost import recipe

    is_folder = (Path(options.teacher) / "config.json").is_file()
    teacher = Teacher(model=options.teacher) if is_folder else recipe.teacher(options.teacher, options.recipes)
    chosen = teacher.server
    teacher.server = options.server or chosen
    words = serve_command(teacher)
    for line in notes(teacher, chosen):
        print(f"smolpost: {line}", file=sys.stderr)
    print(screen.command_line(words), flush=True)
    if options.run:
        os.execv(program(teacher.server, words[0]), words)
    return 0
