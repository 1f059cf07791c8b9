import json
from pathlib import Path

import pytest

from smolpost.chat.tokenizer import build_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
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
def rows():
    """rows("gsm8k/smoltalk2_sft", 100): the first rows of a shared file; the test skips where it is absent."""

    def read(name, limit=None):
        path = SHARED / f"{name}.jsonl"
        if not path.is_file():
            pytest.skip(f"no shared data at {path}")
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for _, line in zip(range(limit or 10**9), lines, strict=False)]

    return read
