"""The key=value words that most verbs take, and the recipe and stage that they mean."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from smolpost.errors import UserError

if TYPE_CHECKING:
    from smolpost.pipeline.lineage import Lineage, Located
    from smolpost.recipe import Request


def add_recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipes",
        "--config-dir",
        action="append",
        default=[],
        metavar="FOLDER",
        help="searched before the library's recipes",
    )


def add_words(parser: argparse.ArgumentParser, metavar: str = "key=value") -> None:
    """Words that compose a recipe."""
    parser.add_argument("words", nargs="*", metavar=metavar)
    add_recipes(parser)


def words_of(options: argparse.Namespace) -> list[str]:
    """The words of `add_words`, with the folders of recipes among them."""
    return [*(f"--recipes={folder}" for folder in options.recipes), *options.words]


def named_models(words: list[str]) -> tuple[list[str], list[str]]:
    """The words that name models (stages, folders, URLs), and the key=value words beside them."""

    def is_model(word: str) -> bool:
        return not word.startswith("--recipes=") and ("=" not in word or "://" in word or Path(word).exists())

    return [word for word in words if is_model(word)], [word for word in words if not is_model(word)]


def one_stage(words: list[str]) -> tuple["Request", "Lineage", "Located"]:
    """The recipe that the words describe, and the one stage that they choose.

    Raises:
        UserError: The recipe cannot be used, or the words do not choose one stage.
    """
    from smolpost import recipe
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one

    request = recipe.load(words)
    lineage = Lineage(request, look_up=True)
    return request, lineage, lineage.stages[select_one(lineage.stages.planned.values(), request.stage).name]


def taken(words: list[str], name: str, what: str, least: int, example: int) -> tuple[list[str], int | None]:
    """The words that are for the recipe, and the number that the last word NAME=NUMBER gives; None without one.

    Raises:
        UserError: It is not a whole number of at least `least`.
    """
    given = [word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}=")]
    number = given[-1] if given else None
    if number is not None and not (number.isascii() and number.isdigit() and int(number) >= least):
        raise UserError(f"{name}={number} is not {what}; give one from {least}, such as {name}={example}")
    return [word for word in words if not word.startswith(f"{name}=")], None if number is None else int(number)


def previewed(words: list[str]) -> tuple[list[str], int | None]:
    """The words without preview=N, and N."""
    return taken(words, "preview", "a number of prompts", 1, 10)


def part(words: list[str]) -> tuple[list[str], int | None]:
    """The words without task=K, and K."""
    return taken(words, "task", "the number of a task", 0, 0)
