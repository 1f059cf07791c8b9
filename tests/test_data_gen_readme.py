"""data_gen/README.md tells the truth: it names every job, and each of its commands means something."""

import re
import shlex

import pytest

from smolpost import cli, recipe
from smolpost.pipeline.plan import plan, select
from tests.small import ROOT

README = (ROOT / "data_gen" / "README.md").read_text()
BLOCKS = re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_every_job_is_named():
    jobs = {file.name for file in (ROOT / "data_gen").glob("*.py")}
    assert set(re.findall(r"^\| `(\w+\.py)`", README, flags=re.MULTILINE)) == jobs


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_mean_something(line):
    program, what, *words = shlex.split(line)
    assert (program == "smolpost" and what in cli.VERBS) or (program == "python" and (ROOT / what).is_file())
    overrides = [word for word in words if "=" in word and not word.startswith(("preview=", "task="))]
    if overrides:
        request = recipe.load(overrides)
        assert select(plan(request), request.stage)
