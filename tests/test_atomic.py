"""One process makes a folder; what a killed one left is gone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smolpost.atomic import workplace
from smolpost.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
HELD = """
import sys, time
from pathlib import Path
from smolpost.atomic import workplace
with workplace(Path(sys.argv[1])) as work:
    (work / "half").write_text("written")
    (work / "folder").mkdir()
    print("here", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HELD, str(out)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"here\n"
        with pytest.raises(UserError, match=f"another process is making {out}"), workplace(out):
            pass
        assert (tmp_path / ".out.making" / "half").read_text() == "written"
        os.kill(process.pid, signal.SIGKILL)
    with workplace(out) as work:
        assert list(work.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), workplace(tmp_path / "new" / "deep" / "out") as work:
        (work / "part").write_text("x")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_the_folders_above_a_result_stay(tmp_path):
    out = tmp_path / "new" / "deep" / "out"
    with workplace(out) as work:
        (work / "out").mkdir()
        (work / "out").rename(out)
    assert list(out.parent.iterdir()) == [out]
