"""Shared by all tests: no network, no noise, and where the real rows lie."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from smolpost.objectives.losses import loss
from smolpost.registry import LOSSES
from tests.hinge import Hinge

# The same examples on every run; `pytest --hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # A core for each worker and what it starts: threads that share one wait for each other longer than they work.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

ROOT = Path(__file__).parent.parent
SLOWEST = ("test_launch.py", "test_chain.py", "test_resume.py", "test_run.py", "test_golden.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that no worker is left with one when the others have ended."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """Folder of the real GSM8K rows that lie beside the checkout."""
    folder = ROOT.parent / "shared" / "data" / "gsm8k"
    if not folder.is_dir():
        pytest.skip("the real rows of ../shared/data/gsm8k are not here")
    return folder


@pytest.fixture
def hinge(monkeypatch):
    """The loss hinge, registered for one test."""
    monkeypatch.setattr(LOSSES, "_entries", dict(LOSSES))
    loss("hinge")(Hinge)
