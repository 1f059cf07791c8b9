"""A step's code is its entry files and what they import, no more and no less; comments do not count."""

from pathlib import Path

import pytest

from smolpost.pipeline import code
from smolpost.pipeline.lineage import CODE
from smolpost.registry import TASK_KINDS

LIBRARY = Path(__file__).parent.parent.parent / "smolpost"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library whose a.py imports b.py inside a function, and never c.py."""
    root = tmp_path / "smolpost"
    for folder in ("pipeline", "room"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").write_text("")
    (root / "__init__.py").write_text("")
    (root / "room" / "a.py").write_text("def f(x):\n    from smolpost.room import b\n    return b.g(x)\n")
    (root / "room" / "b.py").write_text("def g(x):\n    return x + 1\n")
    (root / "room" / "c.py").write_text("import smolpost.room.a\n")
    monkeypatch.setattr(code, "__file__", str(root / "pipeline" / "code.py"))
    yield root
    clear()


def clear():
    for function in (code.code_version, code.imported, code._imports, code._tree):
        function.cache_clear()


def version(library, file, text):
    (library / "room" / file).write_text(text)
    clear()
    return code.code_version("room/a.py")


def test_code_counts_at_any_depth_and_comments_do_not(library):
    plain = version(library, "b.py", "def g(x):\n    return x + 1\n")
    documented = '"""New words."""\n\n\ndef g(x):\n    """More."""\n    return x + 1  # why\n'
    assert version(library, "b.py", documented) == plain
    assert version(library, "c.py", "import os\n") == plain
    assert version(library, "b.py", "def g(x):\n    return x + 2\n") != plain
    assert code.imported(library, "room/c.py") == {"room/c.py", "room/__init__.py"}


def test_entries_exist():
    entries = {entry for entries in CODE.values() for entry in entries}
    entries |= {f"evaluation/tasks/{kind}.py" for kind in TASK_KINDS}
    assert [entry for entry in entries if not (LIBRARY / entry).is_file()] == []


@pytest.mark.parametrize(
    "step, inside, outside",
    [
        ("sft", "model/attention.py", "evaluation/run.py"),
        ("sft", "objectives/logprobs.py", "data/sources.py"),
        ("prepare", "data/packing.py", "model/attention.py"),
        ("prepare", "data/tokenize.py", "training/train.py"),
        ("init", "chat/render.py", "data/packing.py"),
        ("merge", "merging/shards.py", "selection/sweep.py"),
        ("sweep", "selection/sweep.py", "training/train.py"),
        ("task", "inference/generation.py", "evaluation/tasks/ruler.py"),
    ],
)
def test_a_step_hangs_on_what_it_runs(step, inside, outside):
    used = set().union(*(code.imported(LIBRARY, entry) for entry in CODE[step]))
    assert inside in used and outside not in used
