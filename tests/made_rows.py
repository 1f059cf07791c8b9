"""Rows by what they are: those that data_gen makes, which are there everywhere, and real ones beside the checkout."""

from pathlib import Path

from smolpost.data.columns import as_row
from smolpost.data.gsm8k import write_gsm8k
from smolpost.data.practice import write_practice
from smolpost.data.sources import read_rows
from smolpost.schema import Source

REAL = Path(__file__).parents[2] / "shared" / "data"
LAYERS = ["made", "real"] if REAL.is_dir() else ["made"]
FILES = {  # name -> the made file, the real one
    "problems": ("problems.jsonl", "gsm8k/test.jsonl"),
    "mid": ("smoltalk2_mid.jsonl", "gsm8k/smoltalk2_mid.jsonl"),
    "sft": ("smoltalk2_sft.jsonl", "gsm8k/smoltalk2_sft.jsonl"),
    "preference": ("smoltalk2_preference.jsonl", "gsm8k/smoltalk2_preference.jsonl"),
    "tools": ("tools.jsonl", "tau_airline/conversations.jsonl"),
    "tool_pairs": ("tool_pairs.jsonl", "tau_airline/preference.jsonl"),
    "simple_questions": ("call_questions.jsonl", "bfcl/simple_python.jsonl"),
    "simple_answers": ("call_answers.jsonl", "bfcl/simple_python_answers.jsonl"),
    "multiple_questions": ("call_questions.jsonl", "bfcl/multiple.jsonl"),  # the made file has both kinds
    "multiple_answers": ("call_answers.jsonl", "bfcl/multiple_answers.jsonl"),
}


def make_rows(folder: Path) -> None:
    """Every made file, as the stages practice and gsm8k write it."""
    write_practice(folder, problems=1000, conversations=40, pairs=20, calls=60, seed=0)
    source = Source(path=str(folder / "problems.jsonl"), columns="gsm8k")
    problems = (as_row(row, source) for _, row in read_rows(source))
    write_gsm8k(problems, folder, key="stages.gsm8k", sft=0.37, preference=0.1, heldout=0.05, seed=0)
