"""GSM8K from its public file: rows of every stage, no question in two files, and wrong solutions that are wrong."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from smolpost.chat.answers import MathAnswers
from smolpost.data.columns import as_row
from smolpost.data.gsm8k import write_gsm8k
from smolpost.data.mixtures import mix
from smolpost.data.row_shapes.gsm8k import MARK, Problem, problem_of
from smolpost.data.rows import Row
from smolpost.data.slips import with_slip
from smolpost.data.validate import validate_row
from smolpost.errors import UserError
from smolpost.schema import Mixture, Source

PROBLEMS = Path(__file__).parents[1] / "word_problems.jsonl"  # 30, as GSM8K writes them
SOURCE = Source(path="p.jsonl", columns="gsm8k")
CLIPS = {
    "question": "Natalia sold clips to 48 friends in April and half as many in May. How many did she sell?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72",
}


def row(**columns) -> Row:
    return Row({**CLIPS, **columns}, "p.jsonl", 7)


def rows(**source) -> list[Row]:
    return [row for _, row in mix(Mixture(sources={"p": Source(path=str(PROBLEMS), columns="gsm8k", **source)}))]


def problems() -> list[Problem]:
    return [problem_of(Row(json.loads(line), "p.jsonl", 1)) for line in PROBLEMS.read_text().splitlines()]


def written(folder: Path, found: list[Row], **changes) -> tuple[dict, dict[str, list[dict]]]:
    shares = {"sft": 0.37, "preference": 0.1, "heldout": 0.05, "seed": 0} | changes
    report = write_gsm8k(found, folder, key="stages.gsm8k", **shares)
    return report, {
        file.stem.removeprefix("smoltalk2_"): [json.loads(line) for line in file.read_text().splitlines()]
        for file in folder.glob("*.jsonl")
    }


def asked(found: list[dict]) -> set[str]:
    return {(row.get("messages") or row["chosen"])[0]["content"] for row in found}


# ---------------------------------------------------------------- one problem


def test_the_solution_without_its_marks_is_the_reasoning():
    messages = as_row(row(), SOURCE)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["content"] == (
        "<think>\nNatalia sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72 clips.\n</think>\nThe answer is 72."
    )


@pytest.mark.parametrize("end, final", [("#### 1,080", "1,080"), ("####  -5 \n\n", "-5"), ("#### $0.5\r\n", "0.5")])
def test_final_numbers_as_they_are_written(end, final):
    assert problem_of(row(answer=f"It is so.\n{end}")).final == final


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"question": "  "}, "p.jsonl:7: question is empty; write it, or delete the row"),
        ({"answer": ""}, "p.jsonl:7: answer is empty; write it, or delete the row"),
        ({"answer": 72}, "p.jsonl:7: answer is an int; columns=gsm8k expects question and answer, two texts"),
        ({"answer": "48+24 = 72"}, "p.jsonl:7: answer='48+24 = 72' does not end in a line `#### NUMBER`; mend it"),
        ({"answer": "It is so.\n#### many"}, r"p.jsonl:7: answer='It is so.\\n#### many' does not end in a line"),
        ({"answer": "#### 72"}, "p.jsonl:7: answer='#### 72' has no solution before its last line; mend it"),
    ],
)
def test_broken_rows_are_refused_by_file_and_row(changes, text):
    with pytest.raises(UserError, match=re.escape(text).replace(r"\\\\", r"\\")):
        as_row(row(**changes), SOURCE)


def test_rows_of_other_columns_are_refused_and_gsm8k_is_recognised():
    with pytest.raises(UserError, match=r"p.jsonl:7: has the columns messages; columns=gsm8k expects question and"):
        as_row(Row({"messages": []}, "p.jsonl", 7), SOURCE)
    with pytest.raises(UserError, match="they look like GSM8K; set columns: gsm8k"):
        validate_row(as_row(row(), Source(path="p.jsonl")), "p.jsonl:7")


# ---------------------------------------------------------------- slips


def test_a_wrong_result_is_carried_through_to_the_answer():
    found = {with_slip(problem_of(row()), seed) for seed in range(200)}
    first = Problem(CLIPS["question"], "", "")._replace(
        worked="Natalia sold 48/2 = <<48/2=26>>26 clips in May.\nShe sold 48+26 = <<48+26=74>>74 clips.", final="74"
    )
    last = first._replace(
        worked="Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=71>>71 clips.", final="71"
    )
    assert {first, last} <= found
    assert len(found) == 16  # 2 steps x 8 errors
    assert {problem.final for problem in found} == {"67", "69", "70", "71", "73", "74", "75", "77"}


@pytest.mark.parametrize(
    "worked",
    [
        "He has 24 clips.",  # no marks
        "He has 48/2 = <<48/2=24>>24, and <<20+28=48>>48 more.",  # 48 stands for two numbers, 24 is not the answer
        "He has <<48/2=25>>25 clips.",  # a mark that is wrong already
        "He has <<__import__('os').getcwd()=24>>24 clips.",
        "He has <<9**9**9=24>>24 clips.",
    ],
)
def test_no_slip_where_it_would_be_ambiguous(worked):
    assert with_slip(Problem(CLIPS["question"], worked, "48"), 0) is None


def test_every_slip_ends_in_another_number_that_its_steps_give():
    """The marks of the wrong solution are right but for one, and the answer is the value of one of them."""
    answers = MathAnswers("t")
    made = [(problem, with_slip(problem, 3)) for problem in problems()]
    made = [(problem, wrong) for problem, wrong in made if wrong]
    assert len(made) >= 27
    for problem, wrong in made:
        steps = [mark.replace(",", "").split("=") for mark in MARK.findall(wrong.worked)]
        assert sum(abs(eval(left) - float(right)) > 1e-9 for left, right in steps) == 1
        assert float(wrong.final.replace(",", "")) in {float(right) for _, right in steps}
        assert not answers.agree(answers.find(problem.final), answers.find(wrong.final))
        assert ("," in wrong.final) <= ("," in problem.final) and wrong.question == problem.question


def test_slips_depend_on_seed_and_question_alone():
    one = problems()[0]
    found = [with_slip(one, seed) for seed in range(20)]
    assert found == [with_slip(one, seed) for seed in range(20)] and len(set(found)) > 5
    assert with_slip(one, 0) != with_slip(one._replace(question=one.question + " Say why."), 0)


# ---------------------------------------------------------------- the files


def test_every_problem_becomes_one_row_and_no_question_is_in_two_files(tmp_path):
    report, files = written(tmp_path, rows())
    assert report == {
        "problems": 30,
        "duplicates": 0,
        "rows": {"mid": 16, "sft": 10, "heldout": 1, "preference": 2, "heldout_pairs": 1},
    }
    assert {name: len(found) for name, found in files.items()} == report["rows"]
    questions = [json.loads(line)["question"] for line in PROBLEMS.read_text().splitlines()]
    assert Counter(q for found in files.values() for q in asked(found)) == Counter(questions)


def test_rows_are_smoltalk2s(tmp_path):
    files = written(tmp_path, rows())[1]
    for found in files.values():
        for line in found:
            validate_row(line, "f")
    assert set(files["mid"][0]) == {"messages", "source"}
    modes = [line["chat_template_kwargs"]["enable_thinking"] for line in files["sft"]]
    assert modes == [True, False] * 5
    for line in files["sft"]:
        content = line["messages"][1]["content"]
        assert (
            content.startswith("<think>\n") == line["chat_template_kwargs"]["enable_thinking"] and "<<" not in content
        )
        assert re.search(r"The answer is [\d,.]+\.$", content)
    for line in files["preference"]:
        assert line["chosen"][0] == line["rejected"][0] == {"role": "user", "content": line["prompt"]}
        assert line["chosen"][1]["content"] != line["rejected"][1]["content"]
        assert set(line) == {"prompt", "chosen", "rejected", "chat_template_kwargs", "source"}


def test_a_question_that_comes_twice_is_said_and_used_once(tmp_path, capsys):
    twice = [*rows(), *rows(max_rows=5)]
    report, files = written(tmp_path, twice)
    assert (report["problems"], report["duplicates"]) == (30, 5)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[3] == "5 such rows were left out"
    assert re.fullmatch(r"\S+word_problems.jsonl:\d+: asks the question of \S+:\d+ again; left out", out[0])
    counted = Counter(q for found in files.values() for q in asked(found))
    assert set(counted.values()) == {1}


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"sft": 0.01},
            r"stages.gsm8k: 30 problems leave no row for smoltalk2_sft.jsonl with sft=0.01, preference=0.1",
        ),
        ({"preference": 0.99}, r"stages.gsm8k.preference=0.99 asks for 30 pairs, but only 2\d of the 30 problems have"),
        ({"sft": 0.9}, r"stages.gsm8k: 30 problems leave no row for smoltalk2_mid.jsonl"),
    ],
)
def test_shares_that_leave_a_file_empty_are_refused_before_anything_is_written(tmp_path, changes, text):
    with pytest.raises(UserError, match=text):
        written(tmp_path, rows(), **changes)
    assert not list(tmp_path.iterdir())


def test_without_pairs_problems_need_no_marks(tmp_path):
    plain = [row.with_content({**row, "answer": MARK.sub("", row["answer"])}) for row in rows()]
    report, files = written(tmp_path, plain, preference=0.0)
    assert set(files) == {"mid", "sft", "heldout"} and sum(report["rows"].values()) == 30
    with pytest.raises(
        UserError, match=r"preference=0.1 asks for 3 pairs, but only 0 .*or set stages.gsm8k.preference=0"
    ):
        written(tmp_path, plain)


def test_a_whole_file(rows_file, tmp_path):
    source = Source(path=str(rows_file("problems")), columns="gsm8k")
    report, _ = written(tmp_path, [row for _, row in mix(Mixture(sources={"p": source}))])
    assert (
        report["rows"]
        == {
            1000: {"mid": 530, "sft": 352, "heldout": 18, "preference": 95, "heldout_pairs": 5},
            1319: {"mid": 699, "sft": 464, "heldout": 24, "preference": 125, "heldout_pairs": 7},
        }[report["problems"]]
    )
