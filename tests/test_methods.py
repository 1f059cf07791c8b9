"""docs/methods.md tells the truth: its losses and settings exist. test_docs.py has its commands."""

import dataclasses
import re
from pathlib import Path

from smolpost.registry import LOSSES
from smolpost.training.settings import TRL_LOSSES, TRLSFT, TRLPreference

PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()


def test_every_loss_is_named():
    assert {loss for loss in (*LOSSES, *TRL_LOSSES) if f"`{loss}`" not in PAGE} == set()


def test_settings_of_trl_exist():
    known = {field.name for settings in (TRLSFT, TRLPreference) for field in dataclasses.fields(settings)}
    named = set(re.findall(r"`trl\.(\w+)", PAGE))
    assert len(named) >= 2 and named <= known
