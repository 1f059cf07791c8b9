"""A run goes on with what it was begun with, or says in one line what has changed."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from smolpost.errors import UserError
from smolpost.synthesis import run_begin
from smolpost.synthesis.records import Prompt
from smolpost.synthesis.run import generate, records, teacher_of
from smolpost.synthesis.run_begin import prepare
from tests.synthesis.fakes import FakeTeacher, make_prompts, once

FINGERPRINT = {"teacher": {"model": "Qwen/Qwen3-32B", "temperature": 0.6, "top_k": 20}, "template": "a1", "seed": 0}
ROOT = Path(__file__).parents[2]


def ask(folder, engine=None, prompts=None, *, chunk_size=10, tasks=1, **changes):
    return generate(
        folder, make_prompts(30) if prompts is None else prompts, once, engine or FakeTeacher(),
        SimpleNamespace(chunk_size=chunk_size, tasks=tasks, retry_failed=False),
        fingerprint=FINGERPRINT | changes, concurrency=4,
    )  # fmt: skip


@pytest.fixture
def cut(tmp_path):
    """The folder of a run that was cut after ten prompts."""
    folder = tmp_path / "replies" / "traces-a1b2"
    with pytest.raises(UserError, match="stop"):
        ask(folder, FakeTeacher(error=UserError("stop"), error_after=10))
    return folder


def written(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith(".lock"))


TEACHER = FINGERPRINT["teacher"]
OTHER = make_prompts(30)
OTHER[29].row["messages"][0]["content"] = "29+29 ?"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"teacher": TEACHER | {"temperature": 0.7}}, "teacher.temperature=0.6, and now it is 0.7; set it back, or"),
        ({"teacher": {"model": "Qwen/Qwen3-32B", "temperature": 0.6}}, "teacher.top_k=20, and now it is null; set it"),
        ({"teacher": TEACHER | {"model": "m"}}, "teacher.model=Qwen/Qwen3-32B, and now it is m; set it back, or"),
        ({"template": "b2", "seed": 1}, r"template=a1, and now it is b2 \(seed changed, too\); set it back, or remove"),
        ({"template": "b" * 100}, r"template=a1, and now it is b{60}\.\.\. \(100 characters\); set"),
        ({"stop": ["\n"]}, r'stop=null, and now it is \["\\n"\]; set it back, or remove the folder to ask for all its'),
        ({"chunk_size": 5}, "chunk_size=10, and now it is 5; set it back"),
        ({"tasks": 3}, "tasks=1, and now it is 3; set it back"),
        ({"prompts": make_prompts(31)}, "prompts=30 with SHA-256 [0-9a-f]{12}, and now it is 31 with SHA-256 [0-9a-f]"),
        ({"prompts": OTHER}, "prompts=30 with SHA-256 [0-9a-f]{12}, and now it is 30 with SHA-256 [0-9a-f]{12}; set"),
        ({"prompts": make_prompts(30)[::-1]}, "prompts=30 with SHA-256"),
    ],
)
def test_a_changed_field_is_refused_by_name_with_both_values(cut, changes, line):
    before = {file: file.read_bytes() for file in cut.rglob("*") if file.is_file()}
    teacher = FakeTeacher()
    with pytest.raises(UserError, match=rf"traces-a1b2 was begun with {line}"):
        ask(cut, teacher, **changes)
    assert not teacher.asked and {file: file.read_bytes() for file in cut.rglob("*") if file.is_file()} == before
    assert ask(cut).done == 30  # set back


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            {"model": "other"},
            "teacher.model=fake, and now it is other; let that one answer again, or remove",
        ),
        ({"server": "sglang"}, "teacher.server=vllm, and now it is sglang; let that"),
        ({"template": "hash"}, "teacher.template=null, and now it is hash; let that one answer again"),
    ],
)
def test_another_teacher_is_refused_before_its_first_request(cut, said, line):
    teacher = FakeTeacher(**said)
    with pytest.raises(UserError, match=f"was begun with {line}"):
        ask(cut, teacher)
    assert not teacher.asked and teacher.opened == 0
    assert ask(cut).done == 30


def test_an_updated_server_is_noted_and_may_go_on(cut, capsys):
    assert ask(cut, FakeTeacher(version="0.12", max_model_len=4096)).done == 30
    said = capsys.readouterr().out
    assert "the teacher's version is 0.12 now; it was 0.11 before" in said
    assert "the teacher's max_model_len is 4096 now; it was None before" in said
    assert teacher_of(cut) == FakeTeacher().said | {"version": "0.11, then 0.12"}
    assert json.loads((cut / "run.json").read_text())["teacher_updates"] == [{"version": "0.12", "max_model_len": 4096}]


def test_a_teacher_that_never_answered_may_be_another_one(tmp_path):
    class Silent(FakeTeacher):
        async def identity(self):
            raise UserError("it does not think when asked")

    with pytest.raises(UserError, match="does not think"):
        ask(tmp_path / "r", Silent())
    assert ask(tmp_path / "r", FakeTeacher(model="other")).done == 30


def test_a_retry_is_held_to_the_teacher_of_its_run(tmp_path):
    ask(tmp_path / "r", FakeTeacher(failures={"3+3?": "down"}))
    again = SimpleNamespace(chunk_size=10, tasks=1, retry_failed=True)
    with pytest.raises(UserError, match=r"retries/1 was begun with teacher\.model=fake, and now it is other"):
        generate(tmp_path / "r", make_prompts(30), once, FakeTeacher(model="other"), again,
                 fingerprint=FINGERPRINT, concurrency=4)  # fmt: skip


def test_duplicate_ids_are_named_with_both_places_and_nothing_is_written(tmp_path):
    prompts = [*make_prompts(20), Prompt("p7", "web", {}), Prompt("p9", "web", {})]
    teacher = FakeTeacher()
    with pytest.raises(UserError, match=r"prompts 8 \(source sums\) and 21 \(source web\) have the same id 'p7'; give"):
        ask(tmp_path / "replies" / "r", teacher, prompts)
    assert not teacher.asked and written(tmp_path / "replies" / "r") == []
    assert ask(tmp_path / "replies" / "r", teacher).done == 30


def test_ids_that_only_share_a_hash_are_no_duplicates(tmp_path, monkeypatch):
    class Same:
        def __init__(self, *_, **__):
            pass

        def digest(self):
            return bytes(8)

    monkeypatch.setattr(run_begin.hashlib, "blake2b", Same)
    assert ask(tmp_path / "r").done == 30


def test_no_prompt(tmp_path):
    with pytest.raises(UserError, match="there is no prompt to ask about; give the prompts mixture at least one row"):
        ask(tmp_path / "r", prompts=[])
    assert ask(tmp_path / "r").done == 30


def test_rows_that_fail_leave_no_run(tmp_path):
    def failing():
        yield from make_prompts(3)
        raise UserError("rows.jsonl, line 4: no messages")

    with pytest.raises(UserError, match="line 4"):
        ask(tmp_path / "r", prompts=failing())
    assert written(tmp_path / "r") == []


def test_replies_without_a_run_are_refused(tmp_path):
    ask(tmp_path / "r")
    (tmp_path / "r" / "run.json").unlink()
    with pytest.raises(UserError, match=r"r has replies and no run\.json that says what they answer; put that file"):
        ask(tmp_path / "r")
    assert len(written(tmp_path / "r" / "replies")) == 6


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "status.json").write_text("{}")
    (tmp_path / "r" / ".prompts.jsonl.part-12345678").write_text("of a process that was killed")
    ask(tmp_path / "r")
    assert written(tmp_path / "r") == ["chunks.json", "prompts.jsonl", "run.json", "status.json"]


def test_planning_takes_flat_memory(tmp_path):
    def peak(number):
        tracemalloc.start()
        prompts = (Prompt(f"{i}", "s", {"text": "x" * 500}) for i in range(number))
        prepare(tmp_path / str(number), prompts, {}, chunk_size=100, tasks=2)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = peak(2_000), peak(20_000)
    # Two numbers of 64 bits per prompt, sorted once: 32 bytes; arrays grow by an eighth too much.
    assert large - small < 18_000 * 60


def test_records_are_read_as_they_are_asked_for(tmp_path):
    ask(tmp_path / "r", prompts=[Prompt(p.id, p.source, p.row | {"x": "x" * 20_000}) for p in make_prompts(200)])
    tracemalloc.start()
    assert sum(1 for _ in records(tmp_path / "r")) == 200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


LOGURU = """
import sys
from loguru import logger
logger.remove()
logger.add(lambda line: print("mine:", line, end=""), format="{message}")
from smolpost.synthesis import runner
logger.info("still here")
logger.add(lambda line: None)
"""


def test_a_users_sinks_of_loguru_stay():
    done = subprocess.run([sys.executable, "-c", LOGURU], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("mine: still here\n", "")
