"""data_gen/README.md names every job. test_docs.py has its commands."""

import re

from tests.small import ROOT


def test_every_job_is_named():
    jobs = {file.name for file in (ROOT / "data_gen").glob("*.py")}
    page = (ROOT / "data_gen" / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+\.py)`", page, flags=re.MULTILINE)) == jobs
