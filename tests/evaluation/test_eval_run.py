"""The runner: batches, kills and resumption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smolpost.errors import UserError
from smolpost.evaluation import results
from smolpost.evaluation.results import SAMPLES, SCORES, read
from smolpost.evaluation.run import batched, run_task
from smolpost.evaluation.task import Item, Sample
from smolpost.evaluation.tasks.recall import RecallTask


class Counting:
    """Measures the length of each prompt; remembers what it was asked, and stops where it is told to."""

    config, notes = RecallTask(), {"rows_passed_over": 2}

    def __init__(self, lengths, stop_after=None):
        self.lengths, self.stop_after, self.asked = lengths, stop_after, []

    def items(self, tokenizer):
        return [Item(f"item-{i}", [0] * n, max_new_tokens=2) for i, n in enumerate(self.lengths)]

    def measure(self, engine, items):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append([item.id for item in items])
        return [Sample(i.id, {"length": len(i.ids), "long": len(i.ids) > 5}, record={"text": "é\u2028"}) for i in items]


class Letters:
    """As many letters as ids."""

    def decode(self, ids, **options):
        assert options == {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return "é" * len(ids)


class Engine:
    tokenizer = Letters()


def test_batches_hold_like_lengths_within_the_budget():
    items = [Item(str(i), [0] * n, max_new_tokens=1) for i, n in enumerate([9, 3, 3, 4, 29, 9])]
    lengths = [[len(item.ids) for item in batch] for batch in batched(items, 20)]
    assert lengths == [[29], [9, 9], [4, 3, 3]]  # 30 is beyond 20 and comes alone; 2 x 10; 3 x 5


def test_batches_do_not_mix_numbers_of_replies():
    items = [Item("a", [0], num_samples=4), Item("b", [0]), Item("c", [0], num_samples=4)]
    assert [[item.id for item in batch] for batch in batched(items, 100)] == [["a", "c"], ["b"]]


def test_scores_notes_and_every_sample_are_kept(tmp_path):
    task = Counting([3, 8, 5, 9])
    result = run_task("t", task, Engine(), tmp_path, batch_tokens=22, seed=0)
    assert {name: score["value"] for name, score in result["scores"].items()} == {"length": 6.25, "long": 0.5}
    assert (result["num_items"], result["notes"], result["kind"]) == (4, {"rows_passed_over": 2}, "recall")
    samples = [json.loads(line) for line in (tmp_path / SAMPLES).read_text().split("\n")[:-1]]
    assert sorted(s["id"] for s in samples) == [f"item-{i}" for i in range(4)]
    # The prompt as it was asked, whatever the task keeps.
    assert samples[0]["record"] == {"prompt": "é" * 9, "text": "é\u2028"}
    assert results.samples(tmp_path) == [{k: v for k, v in s.items() if k != "record"} for s in samples]
    again = Counting([3, 8, 5, 9])
    assert run_task("t", again, Engine(), tmp_path, batch_tokens=22, seed=0) == result
    assert again.asked == []


def test_a_log_file_hears_of_each_task_and_of_what_was_there(tmp_path, capsys):
    lengths = [3, 8, 5, 9, 4, 7]
    options = {"batch_tokens": 22, "seed": 0, "label": "eval sft: t (task 1 of 2)"}
    with pytest.raises(KeyboardInterrupt):
        run_task("t", Counting(lengths, stop_after=2), Engine(), tmp_path, **options)
    kept = (tmp_path / SAMPLES).read_bytes().count(b"\n")
    run_task("t", Counting(lengths), Engine(), tmp_path, **options)
    run_task("t", Counting(lengths), Engine(), tmp_path, **options)
    said = re.sub(r"\d+ s ", "0 s ", capsys.readouterr().err)
    assert said == f"eval sft: t (task 1 of 2): 6 items in 0 s ({kept} were there)\n"


@pytest.mark.parametrize("torn", [0, 7, 60])
def test_a_cut_run_goes_on_and_ends_in_the_same_scores(tmp_path, torn):
    lengths = [3, 8, 5, 9, 4, 7]
    whole = run_task("t", Counting(lengths), Engine(), tmp_path / "whole", batch_tokens=22, seed=0)
    cut = Counting(lengths, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        run_task("t", cut, Engine(), tmp_path / "cut", batch_tokens=22, seed=0)
    assert read(tmp_path / "cut") is None
    file = tmp_path / "cut" / SAMPLES
    os.truncate(file, file.stat().st_size - torn)  # a write that a power cut tore
    rest = Counting(lengths)
    result = run_task("t", rest, Engine(), tmp_path / "cut", batch_tokens=22, seed=0)
    assert cut.asked[: len(cut.asked) - bool(torn)] + rest.asked == [
        [i.id for i in b] for b in batched(rest.items(0), 22)
    ]
    same = [{k: v for k, v in r.items() if k != "seconds"} for r in (whole, result)]
    assert same[0] == same[1]
    ids = [json.loads(line)["id"] for line in file.read_text().split("\n")[:-1]]
    assert len(ids) == len(set(ids)) == 6


SCRIPT = """
import sys, time
from pathlib import Path
from smolpost.evaluation.run import run_task
from tests.evaluation.test_eval_run import Counting, Engine
class Slow(Counting):
    def measure(self, engine, items):
        time.sleep(0.2)
        return super().measure(engine, items)
run_task("t", Slow([5] * 40), Engine(), Path(sys.argv[1]), batch_tokens=7, seed=0)
"""


def test_kill_9_loses_no_finished_batch(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment)
    file = tmp_path / SAMPLES
    deadline = time.monotonic() + 60
    while not file.is_file() or file.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = file.read_bytes().count(b"\n")
    rest = Counting([5] * 40)
    run_task("t", rest, Engine(), tmp_path, batch_tokens=7, seed=0)
    assert done >= 3 and len(rest.asked) == 40 - done
    assert (tmp_path / SCORES).is_file()


def test_nothing_to_measure_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"evaluation.tasks.t has nothing to measure: no row of its data can be asked"):
        run_task("t", Counting([]), Engine(), tmp_path / "t", batch_tokens=7, seed=0)
    assert not (tmp_path / "t").exists()
