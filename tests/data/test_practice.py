"""Practice rows: every answer follows from its question, and every result is what the function gives."""

import ast
import json
import re
from itertools import pairwise
from random import Random

import pytest

from smolpost import recipe
from smolpost.chat.python_calls import python_calls
from smolpost.data.practice import ANSWERS, QUESTIONS, write_practice
from smolpost.data.row_shapes.gsm8k import MARK, problem_of
from smolpost.data.rows import Row
from smolpost.data.slips import with_slip
from smolpost.data.tool_conversations import FUNCTIONS, STYLES, Shop
from smolpost.data.validate import validate_row
from smolpost.pipeline.lineage import Lineage

COUNTS = {"problems": 2000, "conversations": 60, "pairs": 40, "calls": 60}
SEED = 3


def written(folder, **changes):
    folder.mkdir()
    counts = write_practice(folder, **COUNTS | {"seed": SEED} | changes)
    files = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.iterdir()}
    assert counts == {name: len(rows) for name, rows in files.items()}
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return written(tmp_path_factory.mktemp("practice") / "rows")


def calls_and_results(messages):
    """(name, arguments, result) of each call, whatever the style."""
    for message, result in pairwise(messages):
        if result["role"] != "tool":
            continue
        content = message["content"] or ""
        if structured := message.get("tool_calls"):
            [call] = structured
            assert call["id"] == result["tool_call_id"]
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        elif content.startswith("<code>"):
            [call] = python_calls(content.removeprefix("<code>").removesuffix("</code>"))
            name, arguments = call.name, call.arguments
        else:
            call = json.loads(content.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            name, arguments = call["name"], call["arguments"]
        assert result["name"] == name
        yield name, arguments, json.loads(result["content"])


def assert_fits_schema(name, arguments):
    schema = FUNCTIONS[name]["parameters"]
    types = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list}
    assert set(schema["required"]) <= set(arguments) <= set(schema["properties"])
    for key, value in arguments.items():
        assert type(value) is types[schema["properties"][key]["type"]]


def test_every_calculation_is_right_and_leads_to_the_answer(files):
    for row in files["problems"]:
        marks = [mark.split("=") for mark in MARK.findall(row["answer"])]
        for expression, result in marks:
            left, sign, right = re.fullmatch(r"(\d+)([-+*/])(\d+)", expression).groups()
            assert sign != "/" or int(left) % int(right) == 0
            assert eval(compile(ast.parse(expression, mode="eval"), "", "eval")) == int(result) > 0
        for (_, before), (expression, _) in pairwise(marks):
            assert re.match(rf"{before}[-+*/]", expression)  # each step goes on from the last one
        assert row["answer"].endswith(f"\n#### {marks[-1][1]}") and 2 <= len(marks) <= 5


def test_problems_are_distinct_and_most_can_go_wrong(files):
    assert len({row["question"] for row in files["problems"]}) == 2000
    problems = [problem_of(Row(row, "f", 1)) for row in files["problems"]]
    assert sum(with_slip(problem, 0) is not None for problem in problems) > 1800


@pytest.mark.parametrize("style", STYLES)
def test_every_result_is_the_functions(files, style):
    called = set()
    for i, row in enumerate(files[style]):
        assert validate_row(row, f"{style}:{i}") == "messages"
        shop = Shop(Random(f"{SEED}/{style}/{i}"))
        found = list(calls_and_results(row["messages"]))
        assert 2 <= len(found) <= 3
        for name, arguments, result in found:
            assert_fits_schema(name, arguments)
            assert result == shop.call(name, arguments) and "error" not in result
            called.add(name)
        numbers = [str(value) for _, _, result in found for value in result.values() if isinstance(value, int)]
        replies = " ".join(m["content"] or "" for m in row["messages"] if m["role"] == "assistant")
        assert all(number in replies for number in numbers)
    assert called == set(FUNCTIONS)
    tools = row["tools"] if style == "tools" else [json.loads(f) for f in row["chat_template_kwargs"][style]]
    assert len(tools) == len(FUNCTIONS)


def test_pairs_differ_from_one_call_on_which_is_wrong_on_the_rejected_side(files):
    errors = 0
    for i, row in enumerate(files["tool_pairs"]):
        assert validate_row(row, f"pairs:{i}") == "preference"
        shop = Shop(Random(f"{SEED}/tool_pairs/{i}"))
        sides = [list(calls_and_results(row[side])) for side in ("chosen", "rejected")]
        for found in sides:
            for name, arguments, result in found:
                assert result == shop.call(name, arguments)
        assert sides[0][:-1] == sides[1][:-1] and sides[0][-1] != sides[1][-1]
        assert row["chosen"][:-3] == row["rejected"][:-3] and row["chosen"][-1] != row["rejected"][-1]
        assert "error" not in sides[0][-1][2]
        errors += "error" in sides[1][-1][2]
    assert 0 < errors < 40


def test_questions_have_the_accepted_call(files):
    for question, answer in zip(files[QUESTIONS], files[ANSWERS], strict=True):
        [(name, accepted)] = answer["ground_truth"][0].items()
        offered = {function["name"]: function for function in question["function"]}
        assert question["id"] == answer["id"] and len(offered) == (5 if "multiple" in question["id"] else 1)
        assert offered[name]["parameters"]["type"] == "dict"
        assert_fits_schema(name, {key: values[0] for key, values in accepted.items() if "" not in values})


def test_a_longer_file_begins_with_a_shorter_one_and_another_seed_differs(files, tmp_path):
    shorter = written(tmp_path / "shorter", problems=10, conversations=3, pairs=2, calls=4)
    assert all(files[name][: len(rows)] == rows for name, rows in shorter.items())
    other = written(tmp_path / "other", problems=10, conversations=3, pairs=2, calls=4, seed=SEED + 1)
    assert all(other[name] != rows for name, rows in shorter.items())


def test_a_pipeline_reads_only_the_files_whose_rows_change(tmp_path):
    def keys(*words):
        stages = Lineage(recipe.load(["pipeline=gsm8k", "data=practice", f"run_dir={tmp_path}", *words])).stages
        return {name: stages[name].key for name in ("gsm8k", "base", "init", "apo-42")}

    first, pairs = keys(), keys("stages.practice.pairs=5")
    changed = {name for name in first if first[name] != pairs[name]}
    assert changed == {
        "init",
        "base",
        "apo-42",
    }  # the tokenizer learns from the pairs; GSM8K's stage does not read them
    assert keys("stages.practice.calls=5") == first
