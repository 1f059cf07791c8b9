"""A run asks about each prompt once and keeps one record of it: failures, conversations, retries, parts, full disks."""

import asyncio
import errno
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

from smolpost.errors import UserError
from smolpost.synthesis.records import Prompt, Record, Reply, Request, Sample
from smolpost.synthesis.run import generate, records
from smolpost.synthesis.run_begin import prepare
from smolpost.synthesis.run_folder import Lines, RunCounts, RunFolder, record_json, record_of
from smolpost.synthesis.runner import TeacherRunner, pipeline
from tests.synthesis.fakes import FakeTeacher, make_prompts, once, three_turns


def settings(**changes):
    return SimpleNamespace(**{"chunk_size": 10, "tasks": 1, "retry_failed": False} | changes)


@pytest.fixture
def ask(tmp_path):
    """Run 95 prompts, or others, in one folder."""

    def ask(engine, prompts=None, converse=once, *, concurrency=8, task=None, watch=None, **changes):
        return generate(
            tmp_path / "replies" / "r", make_prompts(95) if prompts is None else prompts, converse, engine,
            settings(**changes), fingerprint={"temperature": 0.6}, concurrency=concurrency, task=task, watch=watch,
        )  # fmt: skip

    ask.folder = tmp_path / "replies" / "r"
    return ask


def ids(folder):
    return [record.id for _, record in records(folder)]


def test_each_prompt_is_asked_once_and_its_record_has_its_place(ask):
    teacher = FakeTeacher(delay=0.001)
    counts = ask(teacher)
    prompts = make_prompts(95)
    kept = list(records(ask.folder))
    assert [prompt for prompt, _ in kept] == prompts
    for prompt, record in kept:
        question = prompt.row["messages"][0]["content"]
        [sample] = record.samples
        assert record == Record(prompt.id, "sums", [sample])
        assert sample.messages == [*prompt.row["messages"], {"role": "assistant", "content": f"re: {question}"}]
        assert sample.replies[0].completion_tokens == len(question) + 4
    assert set(teacher.asked.values()) == {1} and teacher.most == 8 and teacher.opened == 0
    length = sum(len(prompt.row["messages"][0]["content"]) for prompt in prompts)
    assert counts[:5] == (95, 95, 0, length, length + 4 * 95) and counts.seconds > 0


def test_a_finished_run_needs_no_teacher(ask):
    counts = ask(FakeTeacher())
    gone = FakeTeacher(error=UserError("the server is away"), error_after=0)
    gone.identity = None
    assert ask(gone)._replace(seconds=0) == counts._replace(seconds=0)


def test_a_failed_request_fails_its_prompt_alone(ask):
    counts = ask(FakeTeacher(failures={"3+3?": "HTTP 400: too long", "90+90?": "deadline"}))
    assert (counts.prompts, counts.done, counts.failed) == (95, 93, 2)
    failed = [record for _, record in records(ask.folder) if record.error]
    assert failed == [
        Record("p3", "sums", [], "HTTP 400: too long", ("500", "ReadTimeout")),
        Record("p90", "sums", [], "deadline", ("500", "ReadTimeout")),
    ]


def test_an_error_of_all_requests_ends_the_run_as_itself_and_what_was_answered_stays(ask, capfd):
    wrong = UserError("stages.traces.teacher.api_key_env: the key is wrong; set another")
    teacher = FakeTeacher(error=wrong, error_after=40, delay=0.001)
    with pytest.raises(UserError) as raised:
        ask(teacher)
    assert raised.value is wrong and capfd.readouterr() == ("", "")
    assert teacher.opened == 0
    with pytest.raises(UserError, match=r"unfinished: in \d+ of 10 chunks of prompts some have no reply; the command"):
        records(ask.folder)
    later = FakeTeacher()
    assert ask(later).done == 95
    assert ids(ask.folder) == [f"p{i}" for i in range(95)]
    assert later.asked.total() <= 95 - 40 + 8  # at most what was under way is asked twice


def test_the_end_does_not_wait_for_requests_under_way(ask):
    class Hanging(FakeTeacher):
        async def ask(self, request):
            if request.messages[-1]["content"] == "0+0?":
                await asyncio.sleep(3600)
            return await super().ask(request)

    began = time.monotonic()
    with pytest.raises(UserError, match="stop"):
        ask(Hanging(error=UserError("stop"), error_after=5))
    assert time.monotonic() - began < 5


def test_a_fault_of_the_job_ends_the_run_as_itself(ask):
    async def broken(prompt, asking):
        raise ZeroDivisionError(prompt.id)

    with pytest.raises(ZeroDivisionError, match="p0"):
        ask(FakeTeacher(), converse=broken)


def test_answered_turns_of_an_unfinished_conversation_are_not_asked_again(ask):
    first = FakeTeacher(error=UserError("stop"), error_after=30, delay=0.001)
    with pytest.raises(UserError, match="stop"):
        ask(first, make_prompts(20), three_turns)
    second = FakeTeacher()
    counts = ask(second, make_prompts(20), three_turns)
    assert counts.done == 20
    assert first.asked.total() + second.asked.total() <= 60 + 8
    for prompt, record in records(ask.folder):
        texts = [message["content"] for message in record.samples[0].messages]
        question = f"{prompt.id[1:]}+{prompt.id[1:]}?"
        turns = [question, f"1 {prompt.id}", f"2 {prompt.id}"]
        assert texts == [text for turn in turns for text in (turn, f"re: {turn}")]
    assert not list(ask.folder.rglob("*.turns.jsonl"))


def test_samples_of_one_request_are_replayed_one_by_one(ask):
    async def twice(prompt, asking):
        request = Request(prompt.row["messages"], None, seed=1)
        replies = [await asking(request), await asking(request)]
        return [Sample(prompt.row["messages"], [reply]) for reply in replies]

    class Counting(FakeTeacher):
        async def ask(self, request):
            reply = await super().ask(request)
            return reply._replace(content=f"{reply.content} {self.asked.total()}")

    with pytest.raises(UserError, match="stop"):
        ask(Counting(error=UserError("stop"), error_after=1), make_prompts(1), twice, concurrency=1)
    ask(Counting(), make_prompts(1), twice)
    [(_, record)] = records(ask.folder)
    assert [sample.replies[0].content for sample in record.samples] == ["re: 0+0? 1", "re: 0+0? 1"]


def test_every_finished_prompt_is_watched_with_counts_that_go_on(ask):
    seen = []
    with pytest.raises(UserError):
        ask(FakeTeacher(error=UserError("stop"), error_after=25), watch=seen.append, concurrency=1)
    assert [event.counts.done for event in seen] == list(range(1, 26)) and seen[-1].found == RunCounts(95)
    ask(FakeTeacher(failures={"94+94?": "no"}), watch=seen.append, concurrency=1)
    assert [event.record.id for event in seen] == [event.prompt.id for event in seen] == [f"p{i}" for i in range(95)]
    assert seen[-1].counts[:3] == (95, 94, 1) and seen[-1].found[:3] == (95, 25, 0)
    assert seen[-1].counts.prompt_tokens == ask(None).prompt_tokens


# ---------------------------------------------------------------- retries


def test_retry_failed_asks_for_exactly_the_failed_until_none_is_left(ask):
    ask(FakeTeacher(failures={f"{i}+{i}?": "down" for i in (3, 47, 90)}))
    again = FakeTeacher(failures={"47+47?": "still down"})
    counts = ask(again, retry_failed=True)
    assert sorted(again.asked) == ["3+3?", "47+47?", "90+90?"]
    assert (counts.prompts, counts.done, counts.failed) == (95, 94, 1)
    assert [(record.id, record.error) for _, record in records(ask.folder) if record.error] == [("p47", "still down")]
    third = FakeTeacher()
    counts = ask(third, retry_failed=True)
    assert third.asked == {"47+47?": 1} and counts[:3] == (95, 95, 0)
    kept = list(records(ask.folder))
    assert [record.id for _, record in kept] == [f"p{i}" for i in range(95)]
    assert not any(record.error for _, record in kept)
    nothing = FakeTeacher()
    assert ask(nothing, retry_failed=True)[:5] == counts[:5] and not nothing.asked
    assert counts.prompt_tokens == sum(s.replies[0].prompt_tokens for _, record in kept for s in record.samples)


def test_a_retry_that_was_cut_goes_on(ask):
    ask(FakeTeacher(failures={f"{i}+{i}?": "down" for i in range(0, 90, 2)}))
    with pytest.raises(UserError, match="stop"):
        ask(FakeTeacher(error=UserError("stop"), error_after=21), retry_failed=True, concurrency=1)
    # Whatever a retry has finished so far, a record is there for each prompt.
    assert len(ids(ask.folder)) == 95
    assert ask(FakeTeacher()).failed == sum(bool(record.error) for _, record in records(ask.folder))
    rest = FakeTeacher()
    assert ask(rest, retry_failed=True)[:3] == (95, 95, 0)
    assert sorted(rest.asked) == sorted(f"{i}+{i}?" for i in range(42, 90, 2))
    assert [path.name for path in (ask.folder / "retries").glob("[0-9]*")] == ["1"]


# ---------------------------------------------------------------- parts


def test_parts_share_the_prompts_without_overlap(ask):
    teachers = [FakeTeacher() for _ in range(3)]
    for task, teacher in enumerate(teachers[:2]):
        counts = ask(teacher, task=task, tasks=3)
        assert counts.done < counts.prompts
    with pytest.raises(UserError, match=r"in 4 of 12 chunks of prompts some have no reply in parts 2; the command"):
        records(ask.folder)
    assert ask(teachers[2], task=2, tasks=3)[:3] == (95, 95, 0)
    assert ids(ask.folder) == [f"p{i}" for i in range(95)]
    together = sum((teacher.asked for teacher in teachers), FakeTeacher().asked)
    assert set(together.values()) == {1} and len(together) == 95
    assert all(31 <= teacher.asked.total() <= 32 for teacher in teachers)


def test_more_parts_than_prompts(ask):
    assert ask(FakeTeacher(), make_prompts(2), task=1, tasks=4).prompts == 2
    assert ask(FakeTeacher(), make_prompts(2), tasks=4)[:3] == (2, 2, 0)
    assert ids(ask.folder) == ["p0", "p1"]


def test_a_part_that_is_not_there(ask):
    with pytest.raises(UserError, match="task=2 is not one of the 2 tasks; give 0 to 1"):
        ask(FakeTeacher(), task=2, tasks=2)
    assert not ask.folder.exists()


def test_the_second_process_on_a_part_is_refused(ask):
    async def second(prompt, asking):
        with pytest.raises(UserError) as refused:
            TeacherRunner(ask.folder, once, FakeTeacher(), concurrency=1).run(None, 1, 2)
        refusals.append(str(refused.value))
        return await once(prompt, asking)

    refusals = []
    ask(FakeTeacher(), make_prompts(4), second, task=1, tasks=2)
    assert all("part 1 of " in line and ", or give this process another part of the 2" in line for line in refusals)
    assert len(refusals) == 2 and "is at work in process " in refusals[0]
    assert ask(FakeTeacher(), make_prompts(4), tasks=2).done == 4  # the lock went with its process's work


@pytest.fixture
def prepared(tmp_path):
    """A run of two parts, and the pipeline that asks about its prompts."""
    folder = tmp_path / "r"
    prepare(folder, make_prompts(60), {}, chunk_size=5, tasks=2)
    yield pipeline(folder, three_turns, FakeTeacher(delay=0.001), concurrency=4)
    assert ids(folder) == [f"p{i}" for i in range(60)]
    assert all(len(record.samples[0].replies) == 3 for _, record in records(folder))


def test_datatroves_local_executor_runs_the_same_pipeline(prepared, tmp_path):
    LocalPipelineExecutor(prepared, tasks=2, workers=2, logging_dir=str(tmp_path / "logs")).run()


SBATCH = """#!/bin/bash
for last; do :; done
if grep -q launch_pickled_pipeline "$last"; then
    for part in 0 1; do SLURM_NODELIST=here SLURM_ARRAY_TASK_ID=$part bash "$last" >> {log} 2>&1 & done
    wait
fi
echo Submitted batch job 7
"""


def test_datatroves_slurm_executor_runs_the_same_pipeline(prepared, tmp_path, monkeypatch):
    for name, script in {"sbatch": SBATCH.format(log=tmp_path / "log"), "scontrol": "#!/bin/bash\necho here\n"}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    SlurmPipelineExecutor(
        prepared, tasks=2, time="1:00:00", partition="gpu", with_srun=False, logging_dir=str(tmp_path / "logs")
    ).run()


def test_an_executor_with_another_number_of_tasks_is_refused(tmp_path):
    prepare(tmp_path / "r", make_prompts(6), {}, chunk_size=5, tasks=2)
    [step] = pipeline(tmp_path / "r", once, FakeTeacher(), concurrency=4)
    with pytest.raises(UserError, match="tasks=3 for a run that was begun with tasks=2"):
        step.run(None, 0, 3)


# ---------------------------------------------------------------- files


def test_wherever_a_run_was_torn_it_ends_in_the_same_records(ask, tmp_path):
    ask(FakeTeacher(), make_prompts(20), three_turns)
    whole = list(records(ask.folder))
    shutil.rmtree(ask.folder)
    with pytest.raises(UserError, match="stop"):
        ask(FakeTeacher(error=UserError("stop"), error_after=45, delay=0.001), make_prompts(20), three_turns)
    shutil.copytree(ask.folder, tmp_path / "cut")
    files = sorted(file.name for file in (ask.folder / "replies").glob("*.jsonl"))
    assert len(files) >= 2
    draw = random.Random(0)
    for _ in range(25):
        shutil.rmtree(ask.folder)
        shutil.copytree(tmp_path / "cut", ask.folder)
        for name in files:
            file = ask.folder / "replies" / name
            os.truncate(file, draw.randint(max(0, file.stat().st_size - 700), file.stat().st_size))
        for index in (ask.folder / "replies").glob("*.json"):
            index.unlink()
        later = FakeTeacher()
        assert ask(later, make_prompts(20), three_turns)[:3] == (20, 20, 0)
        assert list(records(ask.folder)) == whole and max(later.asked.values()) == 1


@pytest.mark.parametrize("turns", [True, False])
def test_lines_that_a_kill_or_a_crash_left_are_no_records(ask, turns):
    with pytest.raises(UserError):
        ask(FakeTeacher(error=UserError("stop"), error_after=7), make_prompts(10), concurrency=1)
    file = ask.folder / "replies" / "00000.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"
    file.write_bytes(b"".join(lines)[:-5])
    if not turns:
        (ask.folder / "replies" / "00000.turns.jsonl").unlink()
    later = FakeTeacher()
    ask(later, make_prompts(10))
    assert sorted(later.asked) == [f"{i}+{i}?" for i in ([7, 8, 9] if turns else [2, 6, 7, 8, 9])]
    assert ids(ask.folder) == [f"p{i}" for i in range(10)]


def test_a_damaged_file_is_named_with_a_remedy_that_works(ask):
    ask(FakeTeacher())
    file = ask.folder / "replies" / "00004.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:400] + b"X" * 20 + content[420:])
    with pytest.raises(UserError, match=r"00004.jsonl has no record of prompt 'p\d+' at byte \d+, .*remove 00004.json"):
        ids(ask.folder)
    (ask.folder / "replies" / "00004.json").unlink()
    later = FakeTeacher()
    ask(later)
    assert later.asked.total() <= 2 and ids(ask.folder) == [f"p{i}" for i in range(95)]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    lines = Lines(tmp_path / "lines.jsonl")
    assert [lines.append({"n": n}) for n in range(3)] == [0, 9, 18]

    class Full:
        def __init__(self, file):
            self.file, self.truncate, self.close = file, file.truncate, file.close

        def write(self, data):
            if len(data) < 9:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:4])

    monkeypatch.setattr(lines, "_opened", Full(lines._opened))
    with pytest.raises(OSError, match=r"lines\.jsonl"):
        lines.append({"n": 3})
    assert (tmp_path / "lines.jsonl").read_text() == '{"n": 0}\n{"n": 1}\n{"n": 2}\n'


def test_a_record_comes_back_as_it_was_written(tmp_path):
    reply = Reply("a\u2028b 数 \ud83d", "why", "length", closed=False, tool_calls=[{"id": "1"}], prompt_tokens=3,
                  completion_tokens=None, attempts=2, seconds=0.25, raw={"content": "\ud83d"})  # fmt: skip
    record = Record("i", "s", [Sample([{"role": "user", "content": "é"}], [reply])], None, ("429", "200"))
    lines = Lines(tmp_path / "lines.jsonl")
    lines.append(record_json(record))
    lines.close()
    [(offset, line)] = Lines(tmp_path / "lines.jsonl").whole()
    assert offset == 0 and record_of(line) == record


def test_a_folder_that_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match=r"is not the folder of a run: it has no run\.json"):
        RunFolder(tmp_path)


def test_plain_files_for_other_tools(ask):
    ask(FakeTeacher(), [Prompt("é", "web", {"text": "数"})], converse=said)
    assert json.loads((ask.folder / "prompts.jsonl").read_text()) == {"id": "é", "source": "web", "row": {"text": "数"}}
    line = json.loads((ask.folder / "replies" / "00000.jsonl").read_text())
    assert line["samples"][0]["messages"] == [{"role": "assistant", "content": "re: 数"}]
    assert "数" in (ask.folder / "prompts.jsonl").read_text()


async def said(prompt, asking):
    reply = await asyncio.create_task(asking(Request([{"role": "user", "content": prompt.row["text"]}], True, seed=3)))
    return [Sample([{"role": "assistant", "content": reply.content}], [reply])]
