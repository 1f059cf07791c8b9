"""Practice rows, drawn at random: word problems, conversations with tools, pairs, function-calling questions."""

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from smolpost.data.tool_conversations import STYLES, call_question, conversation_row, pair_row
from smolpost.data.word_problems import word_problem
from smolpost.files import write_text

VERSION = 1  # raised when the same settings and seed give other rows
QUESTIONS, ANSWERS = "call_questions", "call_answers"


def write_practice(folder: Path, *, problems: int, conversations: int, pairs: int, calls: int, seed: int) -> dict:
    """Write the practice rows as JSONL files into the folder.

    A row depends on the seed, its file and its number alone: a longer file begins with the rows of a shorter one.

    Args:
        problems: Word problems in GSM8K's columns, `problems.jsonl`.
        conversations: Multi-turn conversations with function calls in each of three styles: `tools.jsonl`,
            `xml_tools.jsonl`, `python_tools.jsonl`.
        pairs: Multi-turn preference pairs with structured calls, `tool_pairs.jsonl`.
        calls: Function-calling questions and their accepted calls, `call_questions.jsonl` and `call_answers.jsonl`.
    Returns:
        Rows of each file.
    """

    def draws(name: str, number: int) -> Iterable[Random]:
        return (Random(f"{seed}/{name}/{i}") for i in range(number))

    asked = [call_question(draw, i) for i, draw in enumerate(draws(QUESTIONS, calls))]
    files = {"problems": [word_problem(draw) for draw in draws("problems", problems)]}
    files |= {style: [conversation_row(draw, style) for draw in draws(style, conversations)] for style in STYLES}
    files["tool_pairs"] = [pair_row(draw) for draw in draws("tool_pairs", pairs)]
    files[QUESTIONS], files[ANSWERS] = [question for question, _ in asked], [answer for _, answer in asked]
    for name, rows in files.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {name: len(rows) for name, rows in files.items()}
