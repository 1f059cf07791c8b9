"""Shared by all tests: no network, no noise, and rows."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from smolpost.objectives.losses import loss
from smolpost.registry import LOSSES
from tests.hinge import Hinge
from tests.made_rows import FILES, LAYERS, REAL, make_rows

# The same examples on every run; `pytest --hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # A core for each worker and what it starts: threads that share one wait for each other longer than they work.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

SLOWEST = ("test_launch.py", "test_chain.py", "test_resume.py", "test_run.py", "test_golden.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that no worker is left with one when the others have ended."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session")
def made_rows(tmp_path_factory) -> Path:
    """Folder of rows that data_gen makes."""
    folder = tmp_path_factory.mktemp("made_rows")
    make_rows(folder)
    return folder


@pytest.fixture(scope="session", params=LAYERS)
def rows_file(request, made_rows) -> Callable[[str], Path]:
    """rows_file("sft"): a file of made rows, then of real ones where they lie beside the checkout."""
    return lambda name: made_rows / FILES[name][0] if request.param == "made" else REAL / FILES[name][1]


@pytest.fixture
def hinge(monkeypatch):
    """The loss hinge, registered for one test."""
    monkeypatch.setattr(LOSSES, "_entries", dict(LOSSES))
    loss("hinge")(Hinge)
