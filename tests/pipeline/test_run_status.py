"""Where runs are, from their files alone: made, at work, stopped, failed; the logs of stages by name, and followed."""

import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from smolpost import cli, stage_log
from smolpost.files import write_json
from smolpost.pipeline import logs, manifest, record, status
from smolpost.pipeline.run import _stopped

KEY = "0123456789ab"
STEP = {"step": 30, "steps": 120, "loss": 1.25, "tokens_per_second": 5000.0, "seconds_left": 600.0}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with a run of init, sft and apo, of which init is made."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs" / "mine"
    stages = [("init", "init"), ("sft", "sft"), ("apo-1", "apo")]
    entries = [{"name": n, "kind": k, "folder": f"{n}-{KEY}", "evaluation": []} for n, k in stages]
    root.mkdir(parents=True)
    write_json(root / record.FILE, {"words": ["pipeline=mine", "a=b c"], "stages": entries})
    finish(root, "init", 42.0)
    return root


def finish(root, name, seconds):
    folder = root / f"{name}-{KEY}"
    folder.mkdir()
    manifest.write(folder, stage=name, kind=name, key=KEY, seconds=seconds)


def log_of(root, name="sft"):
    return root / "logs" / f"{name}-{KEY}.log"


def leave(root, name="sft", command="train", **fields):
    """The log that an ended command leaves."""
    with stage_log.command():
        stage_log.begin(log_of(root, name), command)
        print(f"a line of {name}")
    left = {"exit_code": None} | fields
    state = {key: value for key, value in (stage_log.state(log_of(root, name)) | left).items() if value is not None}
    write_json(log_of(root, name).with_suffix(".json"), state)


def call(*words):
    with pytest.raises(SystemExit) as end:
        cli.main([*words])
    return end.value.code


def shown(capsys, *words):
    capsys.readouterr()
    assert call("status", *words) == 0
    return capsys.readouterr().out.splitlines()


def test_before_a_stage_begins_it_waits_and_the_command_is_named(runs, capsys):
    lines = shown(capsys)
    assert lines[0] == "mine: 1 of 3 stages finished, in runs/mine"
    assert lines[1].startswith("  init   finished  20") and lines[1].endswith(" UTC, took 42 s")
    assert lines[2:] == [
        "  sft    waiting", "  apo-1  waiting", "next: sft, by `smolpost run pipeline=mine 'a=b c'`"
    ]  # fmt: skip


def test_a_running_stage_shows_its_step_and_how_to_follow_it(runs, capsys, monkeypatch):
    leave(runs, **STEP, logged=stage_log.now())
    monkeypatch.setenv("COLUMNS", "120")
    with stage_log.held(log_of(runs)):
        assert shown(capsys)[2:] == [
            "  sft    training  step 30 of 120, loss 1.25, 5,000 tokens/s, about 10 min left",
            "  apo-1  waiting",
            "follow it: `smolpost logs sft --follow`",
        ]
        [found] = [json.loads(line) for line in shown(capsys, "--json")]
    assert found["next"] is None and found["command"] is None
    assert (found["stages"][1]["state"], found["stages"][1]["step"]) == ("running", 30)


@pytest.mark.parametrize(
    "fields, state, why",
    [
        (STEP, "stopped", "its process was killed, or the machine went down"),
        ({"exit_code": 143}, "stopped", "by SIGTERM"),
        ({"exit_code": 2, "said": "stages.sft.x=1 is wrong"}, "failed", "stages.sft.x=1 is wrong"),
        ({"exit_code": 1}, "failed", "exit code 1"),
        ({"command": "prepare", "exit_code": 0}, "stopped", "after `prepare`"),
    ],
)
def test_a_stage_that_ended_unfinished_says_how_and_where_it_goes_on(runs, capsys, fields, state, why):
    leave(runs, **fields)
    (runs / f"sft-{KEY}" / "checkpoint-20").mkdir(parents=True)
    (runs / f"sft-{KEY}" / "checkpoint-5").mkdir()
    found = status.run_status(runs)
    assert (found.stages[1].state, found.stages[1].why, found.stages[1].checkpoint) == (state, why, 20)
    assert found.next.name == "sft" and found.command == ["smolpost", "run", "pipeline=mine", "a=b c"]


def test_a_run_notes_what_became_of_a_command_that_could_not(runs, capsys):
    lineage, stage = SimpleNamespace(log=lambda folder: log_of(runs)), SimpleNamespace(name="sft", folder=None)
    console = Console()

    def why(code, began, **fields):
        leave(runs, **fields)
        _stopped(lineage, stage, ("accelerate", "launch"), code, began, console)
        return status.run_status(runs).stages[1].why

    assert why(-9, "2026") == "was killed by signal 9"
    assert why(1, "2026") == "ended with exit code 1"
    assert why(1, "2026", exit_code=143, said="ValueError: of rank 1") == "ValueError: of rank 1"
    assert why(1, "9999") == "its process was killed, or the machine went down"  # the log is of an earlier command


def test_a_stage_that_is_made_and_not_measured_is_next(runs):
    text = json.loads((runs / record.FILE).read_text())
    text["stages"][0]["evaluation"] = [f"evaluations/init-{KEY}/recall-0"]
    write_json(runs / record.FILE, text)
    assert status.run_status(runs).next.name == "init"
    assert status.run_status(runs).stages[0].state == "to evaluate"


def test_a_run_without_a_record_is_listed_by_what_is_made(runs, capsys):
    (runs / record.FILE).unlink()
    assert shown(capsys, "runs/mine")[0] == "mine: 1 of 1 stage finished, in runs/mine"
    other = runs.parent / "other"
    other.mkdir()
    write_json(other / record.FILE, {"words": [], "stages": []})
    assert [line for line in shown(capsys, "run_dir=runs") if "finished, in" in line]


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere"], "nowhere does not exist; name a run_dir"),
        (["."], "has no runs; name a run_dir"),
        (["runs", "run_dir=runs"], "runs and runs are two places"),
        (["stages.sft.seeds=[1]"], "is a word of a recipe; add pipeline=NAME"),
        (["runs", "pipeline=tiny"], "runs is a folder beside pipeline=; write run_dir=runs"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(runs, capsys, words, said):
    assert call("status", *words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_recipe_shows_what_would_run_and_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["pipeline=tiny", f"run_dir={tmp_path}"]
    lines = shown(capsys, *words)
    assert lines[0].endswith(f"in {tmp_path}/tiny") and lines[1].split()[1:] == ["waiting", "new"]
    assert lines[-1].endswith(f"`smolpost run {' '.join(words)}`")


def test_status_imports_no_library_that_takes_seconds(runs):
    text = "import sys; from smolpost import cli\ntry: cli.main(['status'])\nexcept SystemExit: pass\n"
    text += "print([name for name in ('torch', 'transformers', 'hydra') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60, cwd=runs.parent.parent
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_log_is_found_by_its_stage_and_cut_to_its_end(runs, capsys):
    leave(runs)
    leave(runs, "apo-1")
    capsys.readouterr()
    assert call("logs", "sft", "-n", "2") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "a line of sft" and len(out.splitlines()) == 2
    assert err == f"runs/mine/logs/sft-{KEY}.log:\n"
    assert call("logs", "sft", "--lines", "0") == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "words, said",
    [
        (["apo"], "no run under runs has a log of a stage apo; choose one of: apo-1, apo-2"),
        (["merge"], "choose one of: apo-1, apo-2, sft"),
        (["sft"], "sft is a stage of several runs under runs; add pipeline=mine or pipeline=other"),
        (["sft", "run_dir=none"], "no run under none has a log of a stage sft; `smolpost run` makes one"),
        (["sft", "-n", "-1"], "--lines -1 is not a number of lines"),
        (["pipeline=tiny"], "pipeline=tiny is not a stage"),
    ],
)
def test_a_log_that_is_not_there_is_refused_in_one_line(runs, capsys, words, said):
    for name in ("sft", "apo-1", "apo-2"):
        leave(runs, name)
    leave(runs.parent / "other")
    capsys.readouterr()
    assert call("logs", *words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_the_end_of_a_long_log_is_read_from_its_end(tmp_path):
    lines = [f"line {number} " + "ü" * 50 for number in range(5000)]
    (tmp_path / "a.log").write_text("\n".join(lines) + "\n")
    assert status.tail(tmp_path / "a.log", 3) == lines[-3:] and status.tail(tmp_path / "a.log", 9000) == lines


def test_following_goes_over_a_stop_and_ends_with_the_stage(runs, capsys, monkeypatch):
    monkeypatch.setattr(logs, "POLL", 0.01)
    leave(runs)
    capsys.readouterr()
    printed = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    follower = threading.Thread(target=logs.show, args=(log_of(runs), 1), kwargs={"follow": True}, daemon=True)
    follower.start()
    until(lambda: any("is not running; waiting" in line for line in printed))
    with stage_log.held(log_of(runs)):
        append(log_of(runs), "went on\nand half a li")
        until(lambda: any("went on" in line for line in printed))
        assert not any("half" in line for line in printed)
        append(log_of(runs), "ne\n")
        finish(runs, "sft", 1.0)
        until(lambda: any("and half a line" in line for line in printed))
        assert follower.is_alive()
    follower.join(5)
    assert not follower.is_alive()


def append(file, text):
    with open(file, "a") as opened:
        opened.write(text)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
