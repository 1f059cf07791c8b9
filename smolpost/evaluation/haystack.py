"""What needles are hidden in, made without a file or the network: noise, prose of a small grammar, the user's text.

A haystack is a supply of units; a context holds the first of them, so that a longer one goes on where a shorter one
ends.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from smolpost.data.paths import readable
from smolpost.errors import UserError

LONGEST_PIECE = 40  # words of a unit of the user's text whose sentences do not end
LONGEST_WORD = 200  # characters; what is longer has no spaces, and is cut

NOISE = (
    "The river is wide.", "The hill is steep.", "The moon is pale.", "On we go from here.", "Then home we come again.",
)  # fmt: skip

# fmt: off
_PEOPLE = (
    "the baker", "a neighbour", "the old captain", "my cousin", "the gardener", "a tired clerk", "the teacher",
    "the miller's daughter", "a young surgeon", "the station master", "our landlady", "a travelling painter",
    "the youngest brother", "the postman", "a retired judge", "the ferryman", "the librarian", "a stranger in grey",
    "the watchmaker", "the whole family", "a visiting engineer", "the night guard", "the choir", "a boy from upstairs",
    "the widow next door", "the apprentice", "an elderly botanist", "the mayor", "her uncle", "the fisherman",
)
_ACTIONS = (
    "painted", "carried", "forgot", "repaired", "borrowed", "admired", "washed", "photographed", "hid", "described",
    "measured", "sold", "returned", "drew", "inspected", "wrapped", "dropped", "praised", "counted", "polished",
    "weighed", "searched for", "talked about", "pointed at", "laughed at", "waited for", "looked after", "paid for",
)
_QUALITIES = (
    "wooden", "broken", "green", "heavy", "borrowed", "dusty", "famous", "narrow", "painted", "quiet", "rusty", "small",
    "strange", "valuable", "yellow", "cheap", "crooked", "faded", "folded", "half-finished", "heated", "locked",
    "misplaced", "rounded", "spotless", "tall", "unusual", "worn",
)
_THINGS = (
    "chair", "bottle", "ladder", "basket of pears", "kitchen clock", "map", "violin case", "lantern", "letter", "coat",
    "bicycle", "garden gate", "tin of buttons", "telescope", "wheelbarrow", "loaf of bread", "mirror", "notebook",
    "pair of boots", "rowing boat", "sewing machine", "stove", "suitcase", "table", "teapot", "umbrella", "window",
    "stack of newspapers", "barrel", "carpet", "chess set", "birdcage",
)
_PLACES = (
    "in the yard", "behind the chapel", "near the harbour", "at the market", "on the stairs", "under the bridge",
    "in the attic", "beside the canal", "at the edge of the forest", "in the waiting room", "across the street",
    "on the roof", "in the orchard", "by the well", "outside the theatre", "along the railway", "in the cellar",
    "on the village green", "next to the pharmacy", "at the far end of the hall",
)
_TIMES = (
    "before breakfast", "after the rain", "on a quiet evening", "during the concert", "early in spring", "at noon",
    "late at night", "on the first day of school", "towards the end of summer", "just before the harvest",
    "in the middle of winter", "on a Sunday", "shortly after lunch", "for the second time", "a week later",
    "while it snowed", "as the bells rang", "long before sunrise", "on the way home", "when the lamps were lit",
)
_REMARKS = (
    "nobody noticed", "it made no difference", "the dog slept through it all", "everybody was pleased",
    "the reason was never found", "this surprised no one", "the weather changed soon after", "some people complained",
    "there was nothing else to do", "the story was told for years", "it took most of the day", "the shops stayed open",
    "the train was late again", "that was considered normal", "it cost almost nothing", "the children copied it",
)
_LINKS = ("because", "although", "until", "while", "even though", "so that in the end", "and as usual", "but later")
_SHAPES = (
    "{who} {did} {what} {where} {when}.",
    "{when}, {who} {did} {what}, and {remark}.",
    "{who} {did} {what} {link} {other} {also} {that}.",
    "{where}, {who} {did} {what}; {remark}.",
    "{who} and {other} {did} {what} {when}, {link} {remark}.",
    "{remark}, {link} {who} {did} {what} {where}.",
    "{when} {who} {did} {what} and {also} {that} {where}.",
    "it was {who} who {did} {what} {when}, {link} {other} {also} {that}.",
)

_MOODS = (
    "amber", "ancient", "bitter", "bright", "calm", "careful", "clever", "cold", "daring", "distant", "eager", "early",
    "faint", "gentle", "golden", "grand", "hidden", "honest", "humble", "idle", "jolly", "keen", "lively", "lonely",
    "lucky", "mellow", "modest", "noble", "patient", "plain", "proud", "quick", "rapid", "rough", "royal", "secret",
    "silent", "simple", "sleepy", "sober", "steady", "stern", "sudden", "tender", "vivid", "warm", "wild", "young",
)
_MATERIALS = (
    "brass", "brick", "bronze", "canvas", "cedar", "chalk", "clay", "copper", "coral", "cotton", "crystal", "glass",
    "granite", "iron", "ivory", "jade", "leather", "linen", "marble", "oak", "paper", "pearl", "pine", "satin",
    "silk", "silver", "slate", "steel", "stone", "velvet", "walnut", "wool",
)
_OBJECTS = (
    "acorn", "anchor", "anvil", "arrow", "badge", "balloon", "banner", "beacon", "bell", "blanket", "bracelet", "brush",
    "bucket", "button", "cabin", "candle", "carriage", "castle", "chimney", "compass", "cradle", "crown", "curtain",
    "desk", "dish", "drum", "engine", "feather", "fence", "flag", "flute", "fountain", "garden", "hammer", "harbour",
    "harp", "hat", "helmet", "island", "jacket", "jar", "kettle", "key", "kite", "ladle", "lighthouse", "medal", "mill",
    "needle", "oven", "palace", "pencil", "pillow", "piano", "plate", "pocket", "pump", "puppet", "ribbon", "ring",
    "saddle", "sail", "scarf", "shield", "shovel", "shutter", "sleeve", "spoon", "statue", "stool", "sword", "temple",
    "tent", "thimble", "throne", "tower", "trumpet", "tunnel", "vase", "wagon", "wheel", "whistle",
)
# fmt: on
_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aeiou"

_PATIENCE = 1000  # names drawn in a row that are all taken


class Supply:
    """Units in a fixed order, made when they are first asked for."""

    def __init__(self, units: Iterator[str]):
        self._units, self._made = units, []

    def first(self, number: int) -> list[str]:
        self._made.extend(itertools.islice(self._units, max(0, number - len(self._made))))
        return self._made[:number]


def noise() -> Iterator[str]:
    return itertools.cycle(NOISE)


def prose(rng: random.Random) -> Iterator[str]:
    """Sentences without digits, quotes or capitals inside, each drawn separately; more than 10^9 differ."""
    while True:
        things = [f"{rng.choice(('the', 'that', 'one'))} {rng.choice(_QUALITIES)} {rng.choice(_THINGS)}" for _ in "12"]
        text = rng.choice(_SHAPES).format(
            who=rng.choice(_PEOPLE),
            other=rng.choice(_PEOPLE),
            did=rng.choice(_ACTIONS),
            also=rng.choice(_ACTIONS),
            what=things[0],
            that=things[1],
            where=rng.choice(_PLACES),
            when=rng.choice(_TIMES),
            remark=rng.choice(_REMARKS),
            link=rng.choice(_LINKS),
        )
        yield text[0].upper() + text[1:]


def text_pieces(file: str) -> list[str]:
    """The sentences of a text file, white space made single spaces, each of at most `LONGEST_PIECE` words.

    Raises:
        UserError: The file cannot be read, is not UTF-8 or holds no word.
    """
    with readable(file, "text file", "check its permissions"):
        content = Path(file).read_bytes()
    try:
        words = re.findall(rf"\S{{1,{LONGEST_WORD}}}", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if not words:
        raise UserError(f"{file}: holds no word; give a text, or leave `text` out for generated prose")
    pieces, piece = [], []
    for word in words:
        piece.append(word)
        if len(piece) == LONGEST_PIECE or re.search(r"[.!?]['\")\]\u2019\u201d]*$", word):
            pieces.append(" ".join(piece))
            piece = []
    return pieces + [" ".join(piece)] * bool(piece)


def around(units: list[str], start: int) -> Iterator[str]:
    """Units from one of them on, beginning again after the last."""
    return itertools.cycle(units[start:] + units[:start])


def distinct(make: Callable[[], str], taken: Iterable[str] = ()) -> Iterator[str]:
    """What `make` returns at random, each once, without what is taken.

    Raises:
        UserError: Nothing new comes any more.
    """
    seen = set(taken)
    while True:
        made = next((made for made in (make() for _ in range(_PATIENCE)) if made not in seen), None)
        if made is None:
            raise UserError(f"no more than {len(seen)} different names like {made} can be made; use shorter lengths")
        seen.add(made)
        yield made


def key_name(rng: random.Random) -> str:
    """One of 125,952 names such as calm-silver-harbour."""
    return "-".join(rng.choice(part) for part in (_MOODS, _MATERIALS, _OBJECTS))


def invented_word(rng: random.Random) -> str:
    """One of 512,000 words that can be spoken. All are of one length, so that none lies within another."""
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in "123")
