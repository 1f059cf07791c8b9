"""GSM8K as the rows of the recipe's stages: reasoning, think and no-think replies, preference pairs, held-out rows."""

import itertools
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from smolpost.data.row_shapes.gsm8k import Problem, problem_of, reply
from smolpost.data.rows import Row
from smolpost.data.slips import with_slip
from smolpost.errors import UserError
from smolpost.files import write_text

SHOWN = 3  # duplicates that are named; the rest is counted


def write_gsm8k(
    rows: Iterable[Row], folder: Path, *, key: str, sft: float, preference: float, heldout: float, seed: int
) -> dict:
    """Write `smoltalk2_{mid,sft,heldout,preference,heldout_pairs}.jsonl` into the folder.

    No two files share a question. The pairs come first: problems in which `with_slip` finds one. Then the SFT rows, of
    which every other one thinks. All other problems are reasoning rows. Held out are the last SFT rows and pairs.

    Args:
        rows: In our columns, as columns=gsm8k gives them, in the order in which they are used.
        key: The recipe key of the stage, used in error messages.
        sft, preference: Shares of the problems; without preference no pairs are written.
        heldout: Share of both that is held out.
        seed: Of the slips.
    Returns:
        Counts of problems, of duplicates that were left out, and of the rows of each file.
    Raises:
        UserError: There are too few problems for every file to get a row, or for the pairs that are asked for.
    """
    problems, duplicates = _distinct(rows)
    wanted = round(preference * len(problems))
    slips = ((problem, wrong) for problem in problems if (wrong := with_slip(problem, seed)) is not None)
    pairs = list(itertools.islice(slips, wanted))
    if len(pairs) < wanted:
        raise UserError(
            f"{key}.preference={preference} asks for {wanted} pairs, but only {len(pairs)} of the {len(problems)} "
            f"problems have calculator marks with a number that can be wrong; lower it, or set {key}.preference=0"
        )
    paired = {problem.question for problem, _ in pairs}
    others = [problem for problem in problems if problem.question not in paired]
    num_sft = round(sft * len(problems))
    files = {"mid": [_mid_row(problem) for problem in others[num_sft:]]}
    sft_rows = [_sft_row(problem, think=i % 2 == 0) for i, problem in enumerate(others[:num_sft])]
    files["sft"], files["heldout"] = _cut(sft_rows, heldout)
    if preference:
        files["preference"], files["heldout_pairs"] = _cut([_pair_row(*pair) for pair in pairs], heldout)
    if empty := [name for name, found in files.items() if not found]:
        raise UserError(
            f"{key}: {len(problems)} problems leave no row for smoltalk2_{empty[0]}.jsonl with sft={sft}, "
            f"preference={preference} and heldout={heldout}; give more problems, or other shares"
        )
    for name, found in files.items():
        write_text(folder / f"smoltalk2_{name}.jsonl", "".join(json.dumps(row) + "\n" for row in found))
    return {"problems": len(problems), "duplicates": duplicates, "rows": {n: len(found) for n, found in files.items()}}


def _distinct(rows: Iterable[Row]) -> tuple[list[Problem], int]:
    """The problems in their order, and the number of rows that ask an earlier question again."""
    problems, first, duplicates = [], {}, 0
    for row in rows:
        problem = problem_of(row.with_content({"question": row["messages"][0]["content"], "answer": row["answer"]}))
        text = " ".join(unicodedata.normalize("NFKC", problem.question).casefold().split())
        if text not in first:
            first[text] = row.where
            problems.append(problem)
            continue
        duplicates += 1
        if duplicates <= SHOWN:
            print(f"{row.where}: asks the question of {first[text]} again; left out", flush=True)
    if duplicates > SHOWN:
        print(f"{duplicates} such rows were left out", flush=True)
    return problems, duplicates


def _cut(rows: list[dict], heldout: float) -> tuple[list[dict], list[dict]]:
    """The rows for training, and the held-out ones, at least one."""
    number = len(rows) - max(1, round(heldout * len(rows)))
    return rows[: max(number, 0)], rows[max(number, 0) :]


def _mid_row(problem: Problem) -> dict:
    return {"messages": _conversation(problem, problem, think=True), "source": "gsm8k"}


def _sft_row(problem: Problem, *, think: bool) -> dict:
    source = "gsm8k_think" if think else "gsm8k_no_think"
    return {"messages": _conversation(problem, problem, think=think), **_mode(think), "source": source}


def _pair_row(problem: Problem, wrong: Problem) -> dict:
    sides = {
        side: _conversation(problem, solved, think=True) for side, solved in (("chosen", problem), ("rejected", wrong))
    }
    return {"prompt": problem.question, **sides, **_mode(True), "source": "gsm8k_slips"}


def _conversation(problem: Problem, solved: Problem, *, think: bool) -> list[dict]:
    answer = reply(solved.worked, solved.final, think=think)
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": answer}]


def _mode(think: bool) -> dict:
    kwargs = {"custom_instructions": "", "python_tools": [], "xml_tools": [], "enable_thinking": think}
    return {"chat_template_kwargs": kwargs}
