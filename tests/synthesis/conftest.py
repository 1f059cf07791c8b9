"""Fixtures on `tiny_checkpoints`, and checkpoints rigged to reply as a function says."""

import pytest

from tests.rigged import Rigged
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
