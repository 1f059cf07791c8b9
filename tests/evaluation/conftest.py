"""A tiny random model and its tokenizer, and models rigged to reply as a function says."""

import pytest

from tests.char_model import char_model, char_tokenizer
from tests.rigged import Rigged


@pytest.fixture(scope="session")
def tokenizer():
    return char_tokenizer()


@pytest.fixture
def model(tokenizer):
    return char_model(tokenizer)


@pytest.fixture
def rig(tokenizer):
    """Return a factory of rigged models: reply function -> model."""
    return lambda reply: Rigged(tokenizer, reply)
