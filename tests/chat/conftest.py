import json

import pytest

from smolpost.chat.tokenizer import build_tokenizer

TEXTS = [
    "the cat sat on the mat and the user asked the assistant why",
    "answer: 42\n<think>\nfour and two\n</think>\n",
] * 5


@pytest.fixture(scope="session")
def bpe():
    return build_tokenizer(TEXTS, kind="bpe", vocab_size=320, template="smollm3")


@pytest.fixture(scope="session")
def char():
    return build_tokenizer(TEXTS, kind="char", vocab_size=320, template="smollm3")


@pytest.fixture(scope="session")
def chatml():
    return build_tokenizer(TEXTS, kind="bpe", vocab_size=320, template="chatml")


@pytest.fixture(scope="session")
def rows(rows_file):
    """rows("sft", 100): the first rows of a file, as dicts."""

    def read(name, limit=None):
        with rows_file(name).open(encoding="utf-8") as lines:
            return [json.loads(line) for _, line in zip(range(limit or 10**9), lines, strict=False)]

    return read
