import shutil

import pytest
import torch

from smolpost.pipeline import steps
from tests.doctor.clinic import Clinic, conversations, pairs


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two threads that wait for each other take ten times as long on a busy machine."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Clinic:
    clinic = Clinic(tmp_path_factory.mktemp("doctor"))
    (clinic.folder / "data").mkdir()
    clinic.write("mid", conversations())
    clinic.write("sft", conversations())
    clinic.write("preference", pairs())
    lineage = clinic.lineage()
    steps.make(lineage, lineage.stages["init"])
    return clinic


@pytest.fixture
def clinic(healthy, tmp_path) -> Clinic:
    shutil.copytree(healthy.folder, tmp_path / "clinic")
    return Clinic(tmp_path / "clinic")
