"""Prompts with verifiable instructions: the user's file in IFEval's format, or own ones drawn from a seed."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from smolpost.data.sources import read_rows
from smolpost.errors import UserError
from smolpost.evaluation.constraints import checked
from smolpost.inference.seeds import derive_seed
from smolpost.schema import Source

Instruction = tuple[str, dict[str, Any]]  # IFEval's id, and its arguments


class Prompt(NamedTuple):
    """A request and what its reply has to follow.

    Attributes:
        key: The file's name of it, or where it stands.
        text: The user's turn.
        instructions: At least one.
    """

    key: str
    text: str
    instructions: list[Instruction]


def read_prompts(path: str, most: int | None, key: str) -> list[Prompt]:
    """The first prompts of a file of {"prompt", "instruction_id_list", "kwargs"}, `key` optional.

    Args:
        path: JSONL or Parquet.
        most: At most this many; None for all.
        key: Of the file in the recipe, for messages.
    Raises:
        UserError: A row has another shape, or an instruction that cannot be verified; rows beyond `most` are not read.
    """
    prompts = []
    for number, row in read_rows(Source(path=path, max_rows=most)):
        where = f"{key}: {row.where}"
        text, names, kwargs = (row.get(column) for column in ("prompt", "instruction_id_list", "kwargs"))
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: prompt={text!r:.80}; expected a text")
        if not isinstance(names, list) or not names:
            raise UserError(f"{where}: instruction_id_list={names!r:.80}; expected a list of IFEval's ids")
        kwargs = [{}] * len(names) if kwargs is None else kwargs
        if not isinstance(kwargs, list) or len(kwargs) != len(names):
            raise UserError(f"{where}: kwargs={kwargs!r:.80}; expected a list with one object per instruction")
        instructions = []
        for i, (name, arguments) in enumerate(zip(names, kwargs, strict=True)):
            if not isinstance(name, str) or not isinstance(arguments, dict | None):
                raise UserError(f"{where}: instruction_id_list[{i}] is not a text, or kwargs[{i}] is not an object")
            instructions.append((name, checked(name, arguments or {}, where)))
        prompts.append(Prompt(str(row.get("key", number)), text, instructions))
    return prompts


# ---------------------------------------------------------------- own prompts


class Kind(NamedTuple):
    """An instruction as own prompts give it.

    Attributes:
        slot: A prompt has one instruction of a slot at most: two might contradict each other.
        phrase: What the user says, with the arguments' names in braces.
        draw: (random numbers, request) -> arguments.
    """

    slot: str
    phrase: str
    draw: Callable[[random.Random, str], dict[str, Any]] = lambda draw, request: {}


MOST_INSTRUCTIONS = 3
REQUESTS = (
    "Write a short text about {}", "Explain to a child what one should know about {}",
    "Write a letter to a friend about {}", "Describe a day that has to do with {}",
    "Advise someone who wants to know more about {}", "Tell a story about {}",
)  # fmt: skip
TOPICS = (
    "a lighthouse", "baking bread", "the phases of the moon", "a lost umbrella", "growing tomatoes", "night trains",
    "a chess club", "the water cycle", "mending clothes", "a mountain village", "keeping bees", "a public library",
    "learning the violin", "the first snow", "an old map", "a school garden", "sailing boats", "street markets",
    "a broken clock", "volcanoes", "a neighbour who paints", "coral reefs", "packing for a long walk", "radio plays",
)  # fmt: skip
WORDS = (
    "morning", "window", "careful", "together", "small", "winter", "question", "slowly", "paper", "bright", "journey",
    "second", "quiet", "yellow", "reason", "pocket", "weather", "borrow", "gentle", "silver",
)  # fmt: skip
FORBIDDEN = ("very", "because", "people", "good", "really", "always", "thing", "nice")  # in no request, in no ending
ENDINGS = ("That is all I can say.", "Write to me soon.", "The rest is up to you.")
NUM_WORDS = {"at least": (60, 160), "less than": (60, 160)}
NUM_SENTENCES = {"at least": (4, 10), "less than": (6, 12)}


def _compared(draw: random.Random, key: str, ranges: dict[str, tuple[int, int]]) -> dict[str, Any]:
    relation = draw.choice(list(ranges))
    return {"relation": relation, key: draw.randint(*ranges[relation])}


def _paragraph(draw: random.Random, request: str) -> dict[str, Any]:
    number = draw.randint(2, 4)
    first_word = draw.choice(("later", "still", "perhaps", "finally", "nobody", "every"))
    return {"num_paragraphs": number, "nth_paragraph": draw.randint(1, number), "first_word": first_word}


KINDS = {
    "keywords:existence": Kind(
        "words", "Use the words {keywords}.", lambda draw, _: {"keywords": draw.sample(WORDS, 2)}
    ),
    "keywords:frequency": Kind(
        "words",
        "The word {keyword} must occur {relation} {frequency} times.",
        lambda draw, _: {"keyword": draw.choice(WORDS), "frequency": draw.randint(2, 4), "relation": "at least"},
    ),
    "keywords:forbidden_words": Kind(
        "words",
        "Do without the words {forbidden_words}.",
        lambda draw, _: {"forbidden_words": draw.sample(FORBIDDEN, 2)},
    ),
    "keywords:letter_frequency": Kind(
        "words",
        "The letter {letter} must occur {let_relation} {let_frequency} times.",
        lambda draw, _: {
            "letter": draw.choice("bfkvw"), "let_frequency": draw.randint(3, 8), "let_relation": "at least",
        },
    ),
    "length_constraints:number_words": Kind(
        "length",
        "Use {relation} {num_words} words.", lambda draw, _: _compared(draw, "num_words", NUM_WORDS)
    ),
    "length_constraints:number_sentences": Kind(
        "length",
        "Write {relation} {num_sentences} sentences.", lambda draw, _: _compared(draw, "num_sentences", NUM_SENTENCES)
    ),
    "length_constraints:number_paragraphs": Kind(
        "layout",
        "Write exactly {num_paragraphs} paragraphs with a line of three asterisks (***) between them.",
        lambda draw, _: {"num_paragraphs": draw.randint(2, 4)},
    ),
    "length_constraints:nth_paragraph_first_word": Kind(
        "layout",
        "Write exactly {num_paragraphs} paragraphs with an empty line between them and no empty line elsewhere; "
        "the first word of paragraph {nth_paragraph} must be {first_word}.",
        _paragraph,
    ),
    "detectable_format:multiple_sections": Kind(
        "layout",
        "Divide your reply into {num_sections} sections that begin with {section_spliter} 1 and so on.",
        lambda draw, _: {"section_spliter": draw.choice(("Section", "Part")), "num_sections": draw.randint(2, 4)},
    ),
    "detectable_format:number_bullet_lists": Kind(
        "layout",
        "Have exactly {num_bullets} bullet points in it: lines that begin with an asterisk and a space.",
        lambda draw, _: {"num_bullets": draw.randint(2, 5)},
    ),
    "detectable_format:json_format": Kind("layout", "Your whole reply must be one JSON object."),
    "combination:two_responses": Kind(
        "layout", "Give two different replies, with six asterisks (******) between them and nowhere else."
    ),
    "combination:repeat_prompt": Kind(
        "layout",
        "Begin your reply with the first sentence of this message, word for word.",
        lambda _, request: {"prompt_to_repeat": request},
    ),
    "change_case:english_capital": Kind("case", "Write in English and in capital letters only."),
    "change_case:english_lowercase": Kind("case", "Write in English and without any capital letter."),
    "change_case:capital_word_frequency": Kind(
        "case",
        "Write {capital_relation} {capital_frequency} words in capital letters.",
        lambda draw, _: {"capital_frequency": draw.randint(2, 5), "capital_relation": "at least"},
    ),
    "startend:end_checker": Kind(
        "ends",
        "End with exactly this sentence and nothing after it: {end_phrase}",
        lambda draw, _: {"end_phrase": draw.choice(ENDINGS)},
    ),
    "startend:quotation": Kind("ends", "Put your whole reply between double quotation marks."),
    "detectable_content:postscript": Kind(
        "ends",
        "Add a postscript at the end that begins with {postscript_marker}",
        lambda draw, _: {"postscript_marker": draw.choice(("P.S.", "P.P.S"))},
    ),
    "detectable_format:title": Kind("marks", "Give it a title in double angle brackets, as in <<title>>."),
    "detectable_format:number_highlighted_sections": Kind(
        "marks",
        "Highlight at least {num_highlights} passages with asterisks, as in *passage*.",
        lambda draw, _: {"num_highlights": draw.randint(1, 3)},
    ),
    "detectable_content:number_placeholders": Kind(
        "marks",
        "Leave at least {num_placeholders} placeholders in square brackets, as in [name].",
        lambda draw, _: {"num_placeholders": draw.randint(1, 3)},
    ),
    "punctuation:no_comma": Kind("punctuation", "Do not use a comma."),
}  # fmt: skip
JSON, SECTIONS = "detectable_format:json_format", "detectable_format:multiple_sections"
AT_ODDS = (  # pairs of instructions from different slots that no reply can follow
    {JSON, "startend:end_checker"}, {JSON, "startend:quotation"}, {JSON, "detectable_content:postscript"},
    {SECTIONS, "change_case:english_capital"}, {SECTIONS, "change_case:english_lowercase"},
    {"combination:repeat_prompt", "startend:quotation"},
)  # fmt: skip


def own_prompts(number: int, seed: int) -> list[Prompt]:
    """Requests in simple English, each with one to three instructions that a reply can follow together.

    All of IFEval's instructions but `language:response_language`, which needs a detector, and
    `detectable_format:constrained_response`, which needs a question to be answered by yes or no. The first prompts
    are the same for every number.
    """
    return [_own_prompt(i, random.Random(derive_seed(seed, "instructions", i))) for i in range(number)]


def _own_prompt(index: int, draw: random.Random) -> Prompt:
    request = draw.choice(REQUESTS).format(draw.choice(TOPICS)) + "."
    wanted, chosen = draw.randint(1, MOST_INSTRUCTIONS), []
    for name in draw.sample(list(KINDS), len(KINDS)):
        fits = all(KINDS[name].slot != KINDS[other].slot and {name, other} not in AT_ODDS for other in chosen)
        if fits and len(chosen) < wanted:
            chosen.append(name)
    instructions = [(name, KINDS[name].draw(draw, request)) for name in chosen]
    phrases = [KINDS[name].phrase.format(**_spoken(kwargs)) for name, kwargs in instructions]
    return Prompt(str(index), " ".join([request, *phrases]), instructions)


def _spoken(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: " and ".join(value) if isinstance(value, list) else value for key, value in kwargs.items()}
