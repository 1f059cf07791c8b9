"""A step's code is its entry files and what they import, no more and no less; comments do not count."""

from pathlib import Path

import pytest

from smolpost import stages  # noqa: F401 (registers the kinds)
from smolpost.pipeline import code
from smolpost.registry import STAGE_KINDS

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
    monkeypatch.setattr(code.inspect, "getfile", lambda kind: str(root / "room" / "a.py"))
    yield root
    clear()


def clear():
    for function in (code.code_version, code.imported, code._imports, code._tree):
        function.cache_clear()


def version(library, file, text):
    (library / "room" / file).write_text(text)
    clear()
    return code.code_version(object)


def test_code_counts_at_any_depth_and_comments_do_not(library):
    plain = version(library, "b.py", "def g(x):\n    return x + 1\n")
    documented = '"""New words."""\n\n\ndef g(x):\n    """More."""\n    return x + 1  # why\n'
    assert version(library, "b.py", documented) == plain
    assert version(library, "c.py", "import os\n") == plain
    assert version(library, "b.py", "def g(x):\n    return x + 2\n") != plain
    assert code.imported(library, "room/c.py") == {"room/c.py", "room/__init__.py"}


def test_a_class_outside_the_library_counts_with_its_own_file(tmp_path, monkeypatch):
    own = tmp_path / "mine.py"
    own.write_text("class Mine:\n    x = 1\n")
    monkeypatch.setattr(code.inspect, "getfile", lambda kind: str(own))
    clear()
    before = code.code_version(object)
    clear()
    own.write_text('class Mine:\n    """Words."""\n\n    x = 1  # why\n')
    assert code.code_version(object) == before
    clear()
    own.write_text("class Mine:\n    x = 2\n")
    assert code.code_version(object) != before


@pytest.mark.parametrize(
    "kind, inside, outside",
    [
        ("sft", "model/attention.py", "evaluation/run.py"),
        ("sft", "data/packing.py", "merging/linear.py"),
        ("init", "chat/render.py", "data/packing.py"),
        ("merge", "merging/shards.py", "training/train.py"),
        ("sweep", "evaluation/run.py", "training/train.py"),
    ],
)
def test_a_kind_hangs_on_what_it_runs(kind, inside, outside):
    used = code.imported(LIBRARY, STAGE_KINDS[kind].__module__.replace("smolpost.", "").replace(".", "/") + ".py")
    assert inside in used and outside not in used
