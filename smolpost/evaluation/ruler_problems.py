"""RULER's 13 problems (Hsieh et al. 2024, arXiv:2404.06654), each over a context of any size.

Numbers of needles, hops and repeats are RULER's; sentences, names and questions are our own. RULER begins the reply
itself; here the question asks for the bare answer, as a chat model begins its own replies.
"""

import math
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from string import ascii_lowercase, ascii_uppercase

from smolpost.evaluation import haystack
from smolpost.evaluation.haystack import Supply, distinct

NUMBER, IDENTIFIER = "number", "identifier"

NUM_NEEDLES = 4  # of multikey_1, multivalue and multiquery
NUM_HOPS = 4  # of vt: five variables
NUM_COMMON = 10  # of cwe
NUM_FREQUENT = 3  # of fwe
ZETA_2 = math.pi**2 / 6  # of fwe's distribution: the word of rank k is a share 1 / (ZETA_2 k^2) of the text
FULL_LENGTH = 4096  # tokens; RULER's cwe repeats its words less often below

# From here on the count of each asked word of fwe, and of the one after them, is another one.
_LEAST_CODED = 80
_EXAMPLE_NOISE = 20  # sentences of vt's example
_MOST_COMMON = f"Which {NUM_COMMON} words occur most often in the list above? Answer with the words alone."


@dataclass(frozen=True)
class Question:
    """A row of the user's questions.

    Attributes:
        text: What is asked.
        documents: What the answer stands in (one, for qa_1), or follows from (several, for qa_2).
        answers: Each right by itself.
    """

    text: str
    documents: list[str]
    answers: list[str]


@dataclass(frozen=True)
class Material:
    """What a problem is made from, beside random numbers.

    Attributes:
        length: Tokens of the prompt that is wanted.
        depth: Where the asked needle stands, in tasks with one, in [0, 1].
        pieces: Of the user's text; None for generated prose.
        question: For qa.
        documents: For qa: all of the questions', among which the question's are hidden.
    """

    length: int
    depth: float
    pieces: list[str] | None = None
    question: Question | None = None
    documents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """One problem; units of its context are sentences, needles, words or documents.

    Attributes:
        message: Number of units to the user's message, always the same one.
        question: What the message ends with.
        references: Right answers.
        smallest: Least number of units.
        supply: Different units that there are: a longer context repeats them. None: no end.
        depth: Where the asked needle stands, in [0, 1]; None in tasks without a single one.
    """

    message: Callable[[int], str]
    question: str
    references: list[str]
    smallest: int = 0
    supply: int | None = None
    depth: float | None = None


def placed(units: list[str], needles: list[str], depths: list[float]) -> list[str]:
    """Units with each needle after its share of them: before the first at depth 0, after the last at 1."""
    order = sorted(range(len(needles)), key=lambda i: depths[i])
    edges = [0, *(round(depths[i] * len(units)) for i in order), len(units)]
    parts = [units[start:end] for start, end in pairwise(edges)]
    for part, i in zip(parts, order, strict=False):
        part.append(needles[i])
    return [unit for part in parts for unit in part]


# ---------------------------------------------------------------- needles


def needle(kind: str, key: str, value: str) -> str:
    return f"A secret {kind} for {key} is {value}."


def single(rng: random.Random, material: Material, *, noise: bool = False, kind: str = NUMBER) -> Problem:
    """One needle in noise or prose."""
    hay = (haystack.noise(), None) if noise else _prose(rng, material)
    return _hidden(*hay, [next(_names(rng))], [next(_values(rng, kind))], [material.depth], kind)


def multikey(rng: random.Random, material: Material) -> Problem:
    """One needle in prose, where three more have other keys."""
    keys, values = _names(rng), _values(rng, NUMBER)
    others = [needle(NUMBER, next(keys), next(values)) for _ in range(NUM_NEEDLES - 1)]
    depths = [material.depth, *(rng.random() for _ in others)]
    return _hidden(*_prose(rng, material), [next(keys)], [next(values)], depths, NUMBER, others)


def among_needles(rng: random.Random, material: Material, *, kind: str = NUMBER) -> Problem:
    """One needle among nothing but needles with other keys."""
    keys, values = _names(rng) if kind == NUMBER else _values(rng, kind), _values(rng, kind)
    key, value = next(keys), next(values)
    hay = (needle(kind, key, value) for key, value in zip(keys, values, strict=True))
    return _hidden(hay, None, [key], [value], [material.depth], kind)


def multivalue(rng: random.Random, material: Material) -> Problem:
    """Four needles in prose with one key, all asked for."""
    return _four(rng, material, [next(_names(rng))])


def multiquery(rng: random.Random, material: Material) -> Problem:
    """Four needles in prose with a key each, all asked for."""
    keys = _names(rng)
    return _four(rng, material, [next(keys) for _ in range(NUM_NEEDLES)])


def _four(rng: random.Random, material: Material, keys: list[str]) -> Problem:
    values = _values(rng, NUMBER)
    references = [next(values) for _ in range(NUM_NEEDLES)]
    depths = [rng.random() for _ in references]
    return _hidden(*_prose(rng, material), keys, references, depths, NUMBER)


def _hidden(
    hay: Iterator[str],
    supply: int | None,
    keys: list[str],
    references: list[str],
    depths: list[float],
    kind: str,
    others: list[str] | None = None,
) -> Problem:
    """Needles that are asked for, then others, at depths of a haystack; one key may have all references."""
    owners = keys * (len(references) // len(keys))
    needles = [needle(kind, key, value) for key, value in zip(owners, references, strict=True)] + (others or [])
    names, number = _listed(keys), kind if len(references) == 1 else f"{kind}s"
    verb = "is the" if len(references) == 1 else "are all the"
    question = f"What {verb} secret {number} for {names} in the text above? Answer with the {number} alone."
    task = f"Secret {kind}s are hidden in the text below. Remember them: you will be asked about them."
    units = Supply(hay)
    return Problem(
        lambda size: f"{task}\n\n{' '.join(placed(units.first(size), needles, depths))}\n\n{question}",
        question,
        references,
        supply=supply,
        depth=depths[0] if len(references) == 1 else None,
    )


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _prose(rng: random.Random, material: Material) -> tuple[Iterator[str], int | None]:
    """Units of a haystack, and how many there are until they repeat."""
    pieces = material.pieces
    if pieces is None:
        return haystack.prose(random.Random(rng.getrandbits(64))), None
    return haystack.around(pieces, rng.randrange(len(pieces))), len(pieces)


def _names(rng: random.Random) -> Iterator[str]:
    return distinct(partial(haystack.key_name, rng))


def _values(rng: random.Random, kind: str) -> Iterator[str]:
    if kind == NUMBER:
        return distinct(lambda: str(rng.randrange(10**6, 10**7)))
    return distinct(lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)))


# ---------------------------------------------------------------- variables and words


def variable_tracking(rng: random.Random, material: Material) -> Problem:
    """A chain of assignments in noise, whose variables all have one value; a short example comes first."""
    example, _, names = _chain(rng, letters=3)
    message, question, variables = _chain(rng, letters=5)
    shown = f"{example(_EXAMPLE_NOISE)}\nAnswer: {' '.join(names)}"
    return Problem(lambda size: _after_example(shown, message(size)), question, variables)


def _chain(rng: random.Random, letters: int) -> tuple[Callable[[int], str], str, list[str]]:
    """Message by number of sentences, question, variables."""
    names = distinct(lambda: "".join(rng.choices(ascii_uppercase, k=letters)), taken=["VAR"])
    variables = [next(names) for _ in range(NUM_HOPS + 1)]
    value = rng.randrange(10**4, 10**5)
    assigned = [f"VAR {variables[0]} = {value}.", *(f"VAR {new} = VAR {old}." for old, new in pairwise(variables))]
    depths = sorted(rng.random() for _ in assigned)
    units = Supply(haystack.noise())
    task = "Variables are given values in the text below, directly or through other variables. Keep track of them."
    question = f"Which variables have the value {value} in the text above? Answer with their names alone."
    return (
        lambda size: f"{task}\n\n{' '.join(placed(units.first(size), assigned, depths))}\n\n{question}",
        question,
        variables,
    )


def common_words(rng: random.Random, material: Material) -> Problem:
    """A numbered list in which ten words occur often and the others seldom; a short example comes first."""
    full = material.length >= FULL_LENGTH
    words = distinct(partial(haystack.invented_word, rng))
    often, seldom, num_others = (10, 3, 30) if full else (3, 1, 10)
    shown = [next(words) for _ in range(NUM_COMMON + num_others)]
    example = _word_list(shown[:NUM_COMMON] * often + shown[NUM_COMMON:] * seldom, rng.getrandbits(64))
    often, seldom = (30, 3) if full else (6, 1)
    common, others, seed = [next(words) for _ in range(NUM_COMMON)], Supply(words), rng.getrandbits(64)
    shown = f"{example}\nAnswer: {' '.join(shown[:NUM_COMMON])}"
    return Problem(
        lambda size: _after_example(shown, _word_list(common * often + others.first(size) * seldom, seed)),
        _MOST_COMMON,
        common,
        smallest=1,
    )


def _word_list(words: list[str], seed: int) -> str:
    random.Random(seed).shuffle(words)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
    task = "Some words of the numbered list below occur more often than others. Remember them."
    return f"{task}\n\n{numbered}\n\n{_MOST_COMMON}"


def frequent_words(rng: random.Random, material: Material) -> Problem:
    """Coded words whose counts follow a zeta distribution; the most frequent one is dots, asked for are the next."""
    words, seed = Supply(distinct(lambda: "".join(rng.choices(ascii_lowercase, k=6)))), rng.getrandbits(64)
    task = "Count how often each word occurs in the coded text below. Dots are no words."
    question = "Which three words occur most often in the coded text above? Answer with the words alone."

    def message(size: int) -> str:
        counts = [int(size / (ZETA_2 * rank**2)) for rank in range(1, math.isqrt(int(size / ZETA_2)) + 1)]
        ranked = ["...", *words.first(len(counts) - 1)]
        coded = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        random.Random(seed).shuffle(coded)
        return f"{task}\n\n{' '.join(coded)}\n\n{question}"

    return Problem(message, question, words.first(NUM_FREQUENT), smallest=_LEAST_CODED)


def _after_example(example: str, message: str) -> str:
    return f"First an example.\n\n{example}\n\nNow your turn.\n\n{message}"


# ---------------------------------------------------------------- questions


def question_answering(rng: random.Random, material: Material) -> Problem:
    """A question of the user's, its documents at random places among those of other questions."""
    asked = material.question
    others = [document for document in material.documents if document not in asked.documents]
    rng.shuffle(others)
    depths = [rng.random() for _ in asked.documents]
    units = Supply(haystack.around(others, 0))
    task = "Answer a question from the documents below."
    question = f"Question: {asked.text}\nAnswer with a few words of the documents alone."

    def message(size: int) -> str:
        documents = placed(units.first(size), asked.documents, depths)
        numbered = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
        return f"{task}\n\n{numbered}\n\n{question}"

    return Problem(message, question, asked.answers, supply=len(others))


PROBLEMS: dict[str, Callable[[random.Random, Material], Problem]] = {
    "niah_single_1": partial(single, noise=True),
    "niah_single_2": single,
    "niah_single_3": partial(single, kind=IDENTIFIER),
    "niah_multikey_1": multikey,
    "niah_multikey_2": among_needles,
    "niah_multikey_3": partial(among_needles, kind=IDENTIFIER),
    "niah_multivalue": multivalue,
    "niah_multiquery": multiquery,
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
    "qa_1": question_answering,
    "qa_2": question_answering,
}
