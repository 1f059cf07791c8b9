"""Checkpoints that several files of tests merge."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.merging.checkpoints import TEMPLATE, save_checkpoint


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Four bf16 checkpoints; "other" has another template. Tests copy before they edit."""
    root = tmp_path_factory.mktemp("trained")
    templates = {"pre": TEMPLATE, "a": TEMPLATE, "b": TEMPLATE, "other": "{{ 'c' }}"}
    return {
        name: save_checkpoint(root / name, seed, dtype=torch.bfloat16, template=template)
        for seed, (name, template) in enumerate(templates.items())
    }


@pytest.fixture
def edited(trained, tmp_path):
    """A copy of b to damage."""
    return Path(shutil.copytree(trained["b"], tmp_path / "edited"))
