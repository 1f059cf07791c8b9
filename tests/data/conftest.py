import json

import pytest

from smolpost.chat.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(["a few words"], kind="char", vocab_size=256, template="smollm3")


@pytest.fixture
def write_jsonl(tmp_path):
    """Rows (dicts, or lines as they are) to a file; returns its path as text."""

    def write(rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return str(tmp_path / name)

    return write
