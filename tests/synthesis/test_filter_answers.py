"""Answers are compared with the row's: as text, as numbers, as mathematics; in processes that may hang or be killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from smolpost.synthesis.filters import answer_workers
from smolpost.synthesis.filters.answer_workers import AnswerWorkers, verify_answers
from smolpost.synthesis.filters.answers import quick_verdict, reference_of, right_answer
from smolpost.synthesis.records import Verdict

pytest.importorskip("math_verify")
RIGHT, WRONG = Verdict(True, "", 1.0), Verdict(False, "wrong_answer", 0.0)
# Python raises a number of 48 million digits to a power, and handles no alarm before it is done.
HANGS = ("3^{10^{8}}", "$2$")


def boxed(text):
    return f"\\boxed{{{text}}}"


# ---------------------------------------------------------------- what counts as the answer


RIGHT_ANSWERS = [
    ("72", "72"),
    ("72", "72.0"),
    ("#### 72", "Natalia sold 72 clips altogether."),
    ("48/2 = <<48/2=24>>24\n#### 72", "The answer is **72**."),
    ("The answer is 10.", "She makes 12/60*50 = $10.\n\n**Answer: 10 dollars**"),
    ("The answer is 18.", "So **\\$18** per day."),
    ("1,234", "The answer is 1234 dollars. She then has $9."),  # not the last number
    ("4", "The answer is 4.\nThis answer is consistent with 7 apples."),
    ("4", f"First {boxed(3)}, then {boxed(4)}. That took 2 steps."),
    ("4", "Final answer: 5\n#### 4"),
    ("-5", f"${boxed('-5')}$"),
    (".5", "0.5"),
    ("\\frac{1}{2}", "0.5"),
    (boxed("\\frac{x}{2}"), f"${boxed('0.5x')}$"),
    ("x^2+1", "The answer is 1+x^2."),
    ("sqrt(2)", boxed("\\sqrt{2}")),
    ("3", boxed("x=3")),
    (boxed("(3, 4)"), boxed("(3,4)")),
    (boxed("\\{1, 2\\}"), boxed("\\{2,1\\}")),
    ("50%", "The answer is 0.5."),
    ("50%", boxed("50\\%")),
    ("5!", "120"),
    ("3:45", "3:45"),
    ("72 dollars", "72"),
    ("Paris", "The answer is **Paris**."),
    ("yes", "Answer: Yes"),
    ("Stra\u00dfe", "The answer is: STRASSE"),
    (boxed("\\text{Paris}"), "Paris"),
    ("B", "(B) because of the rule."),
    ("(B)", "The correct answer is B."),
]
WRONG_ANSWERS = [
    ("72", "73"),
    ("72", ""),
    ("72", "I cannot tell."),
    ("-5", "5"),
    ("12", "1 2"),
    ("1/3", "0.333"),
    ("(5,4)", boxed("(3,4)")),
    ("x^2+1", "The answer is 1."),
    ("3:45", "3"),
    ("Paris", "pairs"),  # equal as a product of letters
    ("B", "The correct answer is (C)."),
    ("no", "Answer: Yes"),
    ("10^{10^{10}}", "The answer is $3$."),
]


@pytest.fixture(scope="module")
def workers():
    with AnswerWorkers(1) as workers:
        yield workers


@pytest.mark.parametrize("pairs, verdict", [(RIGHT_ANSWERS, RIGHT), (WRONG_ANSWERS, WRONG)])
def test_what_is_right_and_what_is_wrong(workers, pairs, verdict):
    verdicts = workers.verdicts(pairs)
    assert [pair for pair, found in zip(pairs, verdicts, strict=True) if found != verdict] == []


def test_the_pure_function_says_what_the_workers_say():
    assert right_answer("1/2", "0.5") == RIGHT and right_answer("1/2", "0.6") == WRONG


@pytest.mark.parametrize("reference", ["", " \n", "word " * 26, "In 1969 the moon was " + "very " * 30 + "far"])
def test_prose_without_a_marked_answer_is_no_reference(reference):
    assert quick_verdict(reference, "72") == Verdict(False, "no_reference")
    assert quick_verdict(reference + "\n#### 72", "72") == RIGHT


def test_the_reference_is_the_rows_last_answer_without_its_reasoning():
    turns = [("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"), ("assistant", "<think>\n3?\n</think>\n4")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert reference_of({"messages": messages}) == reference_of({"chosen": messages, "rejected": []}) == "4"
    assert reference_of({"messages": messages[:1]}) == reference_of({"text": "4"}) == ""
    assert reference_of({"messages": [{"role": "assistant", "content": None}]}) == ""
    assert reference_of({"messages": [{"role": "assistant", "content": "<think>\ncut"}]}) == ""


def test_common_answers_need_no_process():
    pairs = [("#### 72", "The answer is 72."), ("The answer is 1,000.", boxed("1000")), ("Paris", "Rome"), ("", "1")]
    with AnswerWorkers(1) as workers:
        assert [v.passed for v in workers.verdicts(pairs)] == [True, True, False, False]
        assert workers.idle == []


def test_a_text_of_a_megabyte_is_read_at_its_end(workers):
    start = time.process_time()
    noise = ["a" * 2**20, "$" * 2**20, "\\boxed{" * 2**17, "answer is " * 2**17, "1 " * 2**19]
    assert [quick_verdict("4", text + "\n#### 4") for text in noise] == [RIGHT] * 5
    assert workers.verdicts([("1/2", text + "\n#### 0.5") for text in noise]) == [RIGHT] * 5
    assert time.process_time() - start < 5


# ---------------------------------------------------------------- processes


def test_a_pair_that_hangs_is_undecided_and_the_others_are_not():
    with AnswerWorkers(2, seconds=1.0) as workers:
        start = time.perf_counter()
        assert workers.verdicts([HANGS, ("1/2", "0.5"), ("1/3", "0.5")]) == [Verdict(False, "undecided"), RIGHT, WRONG]
        assert time.perf_counter() - start < 60  # no answer in any time without the limit
        assert len(workers.idle) == 1


def test_a_worker_that_is_killed_is_replaced():
    with AnswerWorkers(1) as workers:
        workers.verdicts([("1/2", "0.5")])
        [worker] = workers.idle
        worker.process.kill()
        assert workers.verdicts([("1/2", "0.5"), ("1/3", "0.5")]) == [RIGHT, WRONG]
        assert workers.idle[0] is not worker


def test_a_worker_that_is_killed_at_work_is_replaced_and_its_pair_asked_once_more():
    with AnswerWorkers(1, seconds=2.0) as workers:
        workers.verdicts([("1/2", "0.5")])
        killer = threading.Timer(0.5, workers.idle[0].process.kill)
        killer.start()
        assert workers.verdicts([HANGS, ("1/2", "0.5")]) == [Verdict(False, "undecided"), RIGHT]


def test_workers_are_replaced_after_many_pairs(monkeypatch):
    monkeypatch.setattr(answer_workers, "MOST_PAIRS", 2)
    with AnswerWorkers(1) as workers:
        started = []
        for _ in range(4):
            assert workers.verdicts([("1/2", "0.5")]) == [RIGHT]
            started += [worker.process.pid for worker in workers.idle]
        assert len(started) == len(set(started)) == 2  # after the first and the third pair


def test_ctrl_c_ends_the_workers_at_work():
    with AnswerWorkers(1) as workers:
        workers.verdicts([("1/2", "0.5")])
        process = workers.idle[0].process
        interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            workers.verdicts([HANGS])
        assert process.returncode is not None and workers.idle == []
        assert workers.verdicts([("1/3", "0.5")]) == [WRONG]  # not the verdict on the pair before


def _right_in_child(pipe):
    pipe.send(verify_answers([("1/2", "0.5"), ("1/3", "0.5")]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_threads_and_child_processes_can_verify(method):
    pairs = [("1/2", "0.5"), ("1/3", "0.5")] * 3
    with ThreadPoolExecutor(3) as threads:
        assert all(found == [RIGHT, WRONG] * 3 for found in threads.map(verify_answers, [pairs] * 3))
    context = multiprocessing.get_context(method)
    mine, theirs = context.Pipe()
    child = context.Process(target=_right_in_child, args=(theirs,))
    child.start()
    assert mine.poll(60) and mine.recv() == [RIGHT, WRONG]
    child.join(60)
    assert child.exitcode == 0 and verify_answers(pairs) == [RIGHT, WRONG] * 3


def test_workers_end_with_their_process_and_say_nothing(tmp_path):
    code = (
        "from smolpost.synthesis.filters import answer_workers as a\n"
        "print(a.verify_answers([('1/2', '0.5')]), a._shared.workers.idle[0].process.pid, flush=True)\n"
        "import os; os.kill(os.getpid(), 9)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.stdout.startswith("[Verdict(passed=True, reason='', score=1.0)] ") and child.stderr == ""
    pid = int(child.stdout.split()[-1])
    deadline = time.monotonic() + 10
    while _is_there(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_there(pid)


def _is_there(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
