"""A user's mistake in the processes that users start: one line, exit code 2, no traceback of anybody's code."""

import re
import shlex
import subprocess
import sys

import pytest

from smolpost.pipeline import processes
from tests.small import Small, call, environment

# More room than any disk has: refused by the ranks, once the rows are prepared and the model is loaded.
TOO_MUCH = ["stages.sft.save_total_limit=1000000000", "stages.sft.max_steps=1000000000"]
TINY = "pipeline=tiny"
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Small:
    """The toy pipeline with its start checkpoint."""
    small = Small(tmp_path_factory.mktemp("refusals"))
    small.write_data()
    small.words.append("stages.sft.num_workers=1")
    done = small.smolpost("run", "stage=init")
    assert done.returncode == 0, done.stderr
    return small


def refusal(done: subprocess.CompletedProcess, code: int = 2) -> str:
    """The one line that a process says of a user's mistake."""
    assert done.returncode == code, done.stderr
    for other in ("Traceback", "elastic", "CalledProcessError", "ChildFailedError"):
        assert other not in done.stderr + done.stdout, done.stderr
    lines = re.findall(r"^smolpost: (.*)$", done.stderr, re.MULTILINE)
    assert len(lines) == 1, done.stderr
    return lines[0]


RANKS = [["accelerate=single"], ["accelerate=ddp", "accelerate.num_processes=2"]]


@pytest.mark.parametrize("ranks", RANKS, ids=["one process", "two ranks"])
def test_what_ranks_refuse_is_one_line_of_run(started, ranks):
    words = [*TOO_MUCH, "stages.sft.train_roles=[assistant]", *ranks]
    done = started.smolpost("run", "stage=sft", *words)
    line = refusal(done)
    assert "GB for checkpoints and its disk has" in line and "stages.sft.save_total_limit=1000000000" in line
    assert not (started.folder_of("sft", *TOO_MUCH) / "manifest.json").exists()
    shown = next(line for line in done.stdout.splitlines() if line.startswith("$ accelerate launch "))
    assert shlex.split(shown)[-len(words) - 1 :] == [*words, "stage=sft"]


@pytest.mark.slow
def test_a_pasted_launch_of_one_process_is_one_line(started):
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    launch += ["--config_file", "recipes/accelerate/single.yaml", "-m", "smolpost.train"]
    done = call([*launch, *started.words, *TOO_MUCH, "stage=sft"])
    assert "GB for checkpoints and its disk has" in refusal(done, code=1)  # accelerate's own code


@pytest.mark.parametrize(("who", "rank"), [("all", 0), pytest.param("last", 1, marks=SLOW)])
def test_one_of_the_ranks_says_it(started, tmp_path, who, rank):
    """Rank 0 for all, also where it comes last; another rank where it alone has something to say."""
    program = tmp_path / "ranks.py"
    program.write_text(
        "import os, time\n"
        "from smolpost import train\n"
        "from smolpost.errors import UserError\n"
        "from smolpost.pipeline import steps\n"
        "def refuse(*_):\n"
        "    rank = int(os.environ['RANK'])\n"
        f"    time.sleep((3 if {who!r} == 'all' else 60) if rank == 0 else 0)\n"
        "    raise UserError(f'said by rank {rank}')\n"
        f"train.GRACE = 30 if {who!r} == 'all' else 1\n"
        "steps.make_on_ranks = refuse\n"
        "train.main()\n"
    )
    launch = processes.arguments(("accelerate", "launch", "--quiet", "--config_file", "recipes/accelerate/ddp.yaml"))
    launch += ["--num_processes", "2", "--main_process_port", "0", str(program), *started.words, "stage=sft"]
    done = call(launch, env=environment() | processes.ENVIRONMENT)  # as `run` starts it
    assert refusal(done) == f"said by rank {rank}"


JOBS = [
    (["data_gen/tasks.py"], [TINY, "stages.tasks.sed=1", "stage=tasks"], "stages.tasks.sed is not a key of the recipe"),
    (["merge/linear.py"], [TINY, "stage=merge"], "is not finished: "),
    pytest.param(["merge/sweep.py"], [TINY, "stage=sft"], "this job makes sweep stages", marks=SLOW),
    pytest.param(["data_gen/preference_pairs.py"], [TINY, "stage=pairs"], "is not finished: ", marks=SLOW),
    (["-m", "smolpost.train"], ["nonsense"], "cannot read the argument 'nonsense'"),
    pytest.param(["-m", "smolpost.train"], [TINY, "stage=sft"], "is not finished: ", marks=SLOW),
    pytest.param(["-m", "smolpost.cli", "prepare"], [TINY, "stage=nope"], "stage=nope is not a stage of", marks=SLOW),
]


@pytest.mark.parametrize(("program", "words", "text"), JOBS)
def test_jobs_and_commands_refuse_in_one_line(tmp_path, program, words, text):
    assert text in refusal(call([sys.executable, *program, *words, f"run_dir={tmp_path / 'runs'}"]))
    assert not list(tmp_path.rglob("manifest.json"))
