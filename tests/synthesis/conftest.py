"""Fixtures on `tiny_checkpoints`, and checkpoints rigged to reply as a function says."""

import os
from pathlib import Path

import pytest

from tests.rigged import Rigged
from tests.synthesis.thinking_model import trained_once
from tests.synthesis.tiny_checkpoints import make_models, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def models(tokenizer):
    """Return the chosen and the rejected model."""
    return make_models(tokenizer)


@pytest.fixture
def rig(tokenizer):
    """Return a factory of rigged (model, tokenizer): reply function -> checkpoint."""
    return lambda reply: (Rigged(tokenizer, reply), tokenizer)


@pytest.fixture(scope="session")
def thinking_models(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of the strong and the weak thinking model, trained once in a session (half a minute)."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return trained_once(shared / "thinking_models")
