"""Curves of a training in tensorboard, trackio and wandb, read back from their files; no network is asked for."""

import json
import os
import subprocess
import sys

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.pipeline import run
from smolpost.stages.sft import SFTStage
from smolpost.training import trackers
from tests.small import ROOT, call, environment

RUN = "sft-0123456789ab"
# Two tries of one stage, as before and after a stop: both train from the first step.
TRAIN = """
import sys
from pathlib import Path
from smolpost.training import trackers
from tests.training import tiny_trainers as tiny
root, names = Path(sys.argv[1]), sys.argv[2].split(",")
tokenizer = tiny.char_tokenizer()
for number in (1, 2):
    stage = tiny.SFTStage(**tiny.settings(report_to=names, max_steps=3))
    (root / "rows" / str(number)).mkdir(parents=True)
    rows, _ = tiny.prepared(stage, tiny.text_rows(), tokenizer, root / "rows" / str(number))
    out = root / "mine" / "RUN"
    out.mkdir(parents=True, exist_ok=True)
    with trackers.environment(names, out):
        method = stage.method()
        arguments = method.arguments(stage, 1, len(rows), out, tiny.CPU)
        method.trainer(stage, tiny.build(tokenizer), tokenizer, rows, None, arguments, 1, tiny.CPU).train()
print(*trackers.places(root / "mine", [out]), sep="\\n")
if "trackio" in names:
    import json
    from trackio.sqlite_storage import SQLiteStorage
    found = {"runs": SQLiteStorage.get_runs("mine"), "logs": SQLiteStorage.get_logs("mine", "RUN")}
    config = SQLiteStorage.get_run_config("mine", "RUN")
    found["config"] = {key: config[key] for key in ("learning_rate", "run_name", "hidden_size")}
    print(json.dumps(found, default=str))
""".replace("RUN", RUN)


def trained(folder, names, **variables):
    """What the program above printed last, and its folder of the pipeline."""
    around = {k: v for k, v in environment().items() if not k.startswith(("WANDB", "TRACKIO", "TENSORBOARD"))}
    # A proxy that refuses at once: what asks for the network fails, and the training with it.
    around |= {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"} | variables
    done = call([sys.executable, "-c", TRAIN, str(folder), names], env=around | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines(), folder / "mine"


def test_tensorboard_and_trackio_have_the_scalars_of_both_tries_in_one_run(tmp_path):
    lines, root = trained(tmp_path, "tensorboard,trackio")
    board = EventAccumulator(str(root / RUN / "runs")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] in ([1, 2, 3], [1, 2, 3, 1, 2, 3])
    assert {"train/grad_norm", "train/learning_rate", "train/tokens_per_second"} <= set(board.Tags()["scalars"])
    assert [path.parent.name for path in root.rglob("events.out.*")] == ["runs"] * 2
    found = json.loads(lines[-1])
    assert found["runs"] == [RUN]
    assert found["config"] == {"learning_rate": 1e-3, "run_name": RUN, "hidden_size": 16}
    losses = [entry["train/loss"] for entry in found["logs"] if "train/loss" in entry]
    assert len(losses) == 6 and losses[:3] == pytest.approx(losses[3:]) and 3 < losses[0] < 8
    assert f"training curves: `tensorboard --logdir {root}`" in lines
    assert f"training curves: `env TRACKIO_DIR={root}/trackio trackio show --project mine`" in lines


def test_wandb_is_offline_by_itself_and_has_run_config_and_scalars(tmp_path):
    lines, root = trained(tmp_path, "wandb")
    tries = sorted((root / "wandb").glob("offline-run-*"))
    assert tries and all(folder.name.endswith(RUN) for folder in tries)
    [file, *_] = tries[0].glob("*.wandb")
    content = file.read_bytes()
    for word in (RUN, "mine", "train/loss", "train/grad_norm", "learning_rate", "hidden_size"):
        assert word.encode() in content, word
    [line] = [line for line in lines if "wandb sync" in line]
    assert str(root / "wandb") in line


def test_the_users_own_environment_wins_and_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    before = dict(os.environ)
    with trackers.environment(["wandb", "tensorboard"], tmp_path / "mine" / RUN):
        assert os.environ["WANDB_PROJECT"] == "theirs" and os.environ["WANDB_MODE"] == "online"
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "mine" / RUN / "runs")
    assert dict(os.environ) == before


def test_an_unknown_tracker_is_refused_when_the_recipe_is_read():
    with pytest.raises(UserError, match=r"stages\.sft\.report_to has wanbd; choose from tensorboard, trackio, wandb, "):
        recipe.load(["pipeline=tiny", "stages.sft.report_to=[tensorboard,wanbd]"])


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(monkeypatch):
    stage = SFTStage(init_from="x", data="y", max_seq_len=8, global_batch_size=1, learning_rate=1, report_to=["wandb"])
    stage.check_installed("sft")
    monkeypatch.setitem(trackers.MODULES, "wandb", "no_such_module")
    with pytest.raises(UserError, match=r"stages\.sft\.report_to has wandb, .*pip install 'smolpost\[trackers\]'"):
        stage.check_installed("sft")
    assert f"{trackers.EXTRA} = [" in (ROOT / "pyproject.toml").read_text()


def test_a_run_with_a_tracker_that_is_not_installed_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.MODULES, "wandb", "no_such_module")
    monkeypatch.setattr(run.processes, "warm", lambda: pytest.fail("before the libraries are loaded"))
    request = recipe.load(["pipeline=tiny", "stages.sft.report_to=[wandb]", f"run_dir={tmp_path}"])
    with pytest.raises(UserError, match="pip install"):
        run.run(request, Console())
    assert not list(tmp_path.glob("tiny/*-*")) and not (tmp_path / "tiny" / "run.json").exists()


def test_planning_with_trackers_imports_none_of_them():
    text = "import sys; from smolpost import recipe; recipe.load(['pipeline=tiny', 'stages.sft.report_to=[wandb]'])\n"
    text += "print([name for name in ('torch', 'wandb', 'trackio', 'tensorboard') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
