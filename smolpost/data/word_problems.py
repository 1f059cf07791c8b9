"""Word problems of two to five steps, drawn at random, in GSM8K's columns."""

import operator
from dataclasses import dataclass, field
from random import Random

NAMES = (
    "Ada", "Amir", "Bea", "Bruno", "Carla", "Chidi", "Dana", "Emil", "Farah", "Goran", "Hana", "Igor", "Julia", "Kofi",
    "Lena", "Mateo", "Nora", "Omar", "Priya", "Quinn", "Rosa", "Sami", "Tuva", "Viktor", "Wanda", "Yusuf",
)  # fmt: skip
THINGS = ("apples", "beads", "buttons", "cards", "marbles", "muffins", "pencils", "shells", "stamps", "stickers")
PACKS = ("bags", "boxes", "jars", "packets")
_SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def word_problem(draw: Random) -> dict[str, str]:
    """One problem about a number of things that changes step by step.

    Every number is a whole number above 0, and no division leaves a remainder.

    Returns:
        "question", and "answer": a line for each step, with a calculator mark such as `<<6*4=24>>`, and a last line
        `#### NUMBER`.
    """
    name, friend = draw.sample(NAMES, 2)
    story = _Story(draw, name, friend, draw.choice(THINGS))
    draw.choice((_packs, _two_days))(story)
    for change in draw.sample((_buys, _gives, _doubles, _halves), draw.randint(1, 3)):
        change(story)
    draw.choice((_counts, _sells, _fills))(story)
    return {"question": " ".join(story.told), "answer": "\n".join([*story.worked, f"#### {story.total}"])}


@dataclass
class _Story:
    """A problem while it is written; `total` is the number that the steps have led to."""

    draw: Random
    name: str
    friend: str
    things: str
    total: int = 0
    told: list[str] = field(default_factory=list)
    worked: list[str] = field(default_factory=list)

    def work(self, told: str, left: int, sign: str, right: int, said: str) -> None:
        """Tell one step and work it out; `{}` in what is said is the calculation."""
        self.total = _SIGNS[sign](left, right)
        self.told.append(told)
        self.worked.append(said.format(f"{left}{sign}{right} = <<{left}{sign}{right}={self.total}>>{self.total}"))


# ---------------------------------------------------------------- how a problem begins


def _packs(story: _Story) -> None:
    number, each, packs = story.draw.randint(3, 12), story.draw.randint(4, 25), story.draw.choice(PACKS)
    told = f"{story.name} has {number} {packs} with {each} {story.things} in each."
    story.work(told, number, "*", each, f"There are {{}} {story.things} in the {packs}.")


def _two_days(story: _Story) -> None:
    first, second = story.draw.randint(11, 60), story.draw.randint(11, 60)
    told = f"{story.name} collects {first} {story.things} on Monday and {second} on Tuesday."
    story.work(told, first, "+", second, f"On the two days {story.name} collects {{}} {story.things}.")


# ---------------------------------------------------------------- how it goes on


def _buys(story: _Story) -> None:
    more = story.draw.randint(3, 40)
    told = f"Then {story.name} buys {more} more {story.things}."
    story.work(told, story.total, "+", more, f"After that {story.name} has {{}} {story.things}.")


def _gives(story: _Story) -> None:
    given = story.draw.randint(1, min(30, story.total - 1))
    told = f"{story.name} gives {given} of the {story.things} to {story.friend}."
    story.work(told, story.total, "-", given, f"After the gift {story.name} has {{}} {story.things}.")


def _doubles(story: _Story) -> None:
    told = f"{story.friend} brings as many {story.things} as {story.name} has at that time."
    story.work(told, story.total, "*", 2, f"Together that makes {{}} {story.things}.")


def _halves(story: _Story) -> None:
    if story.total % 2 or story.total < 4:
        return
    told = f"Half of the {story.things} get lost."
    story.work(told, story.total, "/", 2, f"Half of them is {{}} {story.things}.")


# ---------------------------------------------------------------- what is asked


def _counts(story: _Story) -> None:
    found = story.draw.randint(2, 9)
    told = f"Then {story.name} finds {found} more. How many {story.things} does {story.name} have now?"
    story.work(told, story.total, "+", found, f"{story.name} now has {{}} {story.things}.")


def _sells(story: _Story) -> None:
    price = story.draw.randint(2, 9)
    told = f"{story.name} sells all of them for ${price} each. How many dollars does {story.name} get?"
    story.work(told, story.total, "*", price, f"{story.name} gets {{}} dollars.")


def _fills(story: _Story) -> None:
    shares = next((n for n in (7, 6, 5, 4, 3, 2) if story.total % n == 0 and story.total > n), None)
    if shares is None:
        return _counts(story)
    told = f"{story.name} shares all of them equally among {shares} friends. How many {story.things} does each get?"
    story.work(told, story.total, "/", shares, f"Each friend gets {{}} {story.things}.")
