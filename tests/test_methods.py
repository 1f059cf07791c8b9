"""docs/methods.md tells the truth: its commands plan, and its losses and settings exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from smolpost import cli
from smolpost.registry import LOSSES
from smolpost.training.settings import TRL_LOSSES, TRLSFT, TRLPreference

PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
RECIPES = {re.search(r"# ([\w.]+):", block)[1]: block for language, block in BLOCKS if language == "yaml"}
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_plan(line, tmp_path, capsys, monkeypatch):
    program, verb, *words = shlex.split(line)
    assert program == "smolpost" and verb in ("plan", "doctor")
    words = [word for word in words if "=" in word]
    [stage] = [word.removeprefix("stage=") for word in words if word.startswith("stage=")]
    for name, text in RECIPES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *words, f"run_dir={tmp_path}"])
    assert stop.value.code == 0
    assert re.search(rf"\b{stage}\b", capsys.readouterr().out)


def test_every_loss_is_named():
    assert {loss for loss in (*LOSSES, *TRL_LOSSES) if f"`{loss}`" not in PAGE} == set()


def test_settings_of_trl_exist():
    known = {field.name for settings in (TRLSFT, TRLPreference) for field in dataclasses.fields(settings)}
    named = set(re.findall(r"`trl\.(\w+)", PAGE))
    assert len(named) >= 2 and named <= known
