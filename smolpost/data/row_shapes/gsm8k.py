"""GSM8K's columns, as OpenAI publishes them."""

import re
from typing import NamedTuple

from smolpost.data.row_shapes.shape import row_shape, without
from smolpost.data.rows import Row, kind_of
from smolpost.errors import UserError
from smolpost.schema import Source

MARK = re.compile(r"<<([^<>]*)>>")  # of a calculator: <<48/2=24>>, right before the number that it gives
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+"
_ANSWER = re.compile(rf"(.*?)\s*^####[ \t]*\$?(-?(?:{NUMBER}))\s*", re.DOTALL | re.MULTILINE)


class Problem(NamedTuple):
    """A word problem.

    Attributes:
        question: As it was written.
        worked: The solution step by step, with its calculator marks.
        final: The number that it ends in, as it was written: "72", "1,080".
    """

    question: str
    worked: str
    final: str


def problem_of(row: Row) -> Problem:
    """The row's problem.

    Raises:
        UserError: A column is missing or empty, or the answer does not end in `#### NUMBER`.
    """
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str):
            found = f"{key} is {kind_of(row[key])}" if key in row else f"has the columns {', '.join(row) or 'none'}"
            raise UserError(f"{row.where}: {found}; columns=gsm8k expects question and answer, two texts")
        if not row[key].strip():
            raise UserError(f"{row.where}: {key} is empty; write it, or delete the row")
    found = _ANSWER.fullmatch(row["answer"])
    if found is None or not found[1].strip():
        said = "has no solution before its last line" if found else "does not end in a line `#### NUMBER`"
        raise UserError(f"{row.where}: answer={row['answer'][-60:]!r} {said}; mend it, or delete the row")
    return Problem(row["question"].strip(), found[1].strip(), found[2])


def reply(worked: str, final: str, *, think: bool) -> str:
    """A reply to a problem: the solution without its calculator marks as reasoning where it thinks, and the number."""
    block = f"<think>\n{MARK.sub('', worked)}\n</think>\n" if think else ""
    return f"{block}The answer is {final}."


@row_shape("gsm8k")
def gsm8k(row: Row, source: Source) -> dict:
    """`question`, and `answer` with calculator marks and a last line `#### NUMBER`: a reply that thinks.

    The column `answer` stays as it is: a job reads the marks from it.
    """
    question, worked, final = problem_of(row)
    turns = [("user", question), ("assistant", reply(worked, final, think=True))]
    return without(row, "question") | {"messages": [{"role": role, "content": text} for role, text in turns]}
