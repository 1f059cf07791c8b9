"""A tiny random model and its tokenizer."""

import pytest

from tests.char_model import char_model, char_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return char_tokenizer()


@pytest.fixture
def model(tokenizer):
    return char_model(tokenizer)
