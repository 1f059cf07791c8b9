"""The toy pipeline, started and trained once for all launch tests."""

import pytest

from tests.small import Small


@pytest.fixture(scope="session")
def started(tmp_path_factory) -> Small:
    """The toy pipeline with its start checkpoint made; tests copy it."""
    small = Small(tmp_path_factory.mktemp("small"))
    small.write_data()
    done = small.smolpost("run", "stage=init")
    assert done.returncode == 0, done.stderr
    return small


@pytest.fixture(scope="session")
def single(started, tmp_path_factory) -> Small:
    """SFT and APO trained by one process: what every other way must match."""
    small = started.copy(tmp_path_factory.mktemp("single"))
    for stage in ("sft", "apo"):
        done = small.launch(stage, "single", 1)
        assert done.returncode == 0, done.stderr
    return small
