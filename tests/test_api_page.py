"""docs/api.md: its examples give what it says, and its signatures are the functions' own."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.small import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()
SIGNATURES = re.findall(r"^## (\w+)\n\n`(smolpost[\w.]+)\((.*)\)`$", PAGE, flags=re.MULTILINE)


def test_the_examples_give_what_the_page_says():
    if find_spec("deepspeed"):  # says once on which device it is, wherever a model is saved first
        importlib.import_module("deepspeed.accelerator").get_accelerator()
    text = re.sub(r"^```.*$", "", PAGE, flags=re.MULTILINE)
    page = doctest.DocTestParser().get_doctest(text, {}, "api.md", "docs/api.md", 0)
    assert len(page.examples) > 60
    failed = []
    doctest.DocTestRunner(verbose=False).run(page, out=failed.append)
    assert not failed, "".join(failed)


def test_each_section_has_a_signature_and_an_example():
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert len(sections) == len(SIGNATURES) >= 10 and all(">>> from smolpost" in section for section in sections)


@pytest.mark.parametrize("heading, path, parameters", SIGNATURES, ids=[heading for heading, _, _ in SIGNATURES])
def test_signatures_are_the_functions_own(heading, path, parameters):
    room, _, name = path.rpartition(".")
    module = importlib.import_module(room)
    names = dict(vars(module))  # a default may be one of the module's constants
    exec(f"def shown({parameters}): ...", names)
    own, shown = (inspect.signature(f).parameters.values() for f in (getattr(module, name), names["shown"]))
    assert name == heading
    assert [(p.name, p.kind, p.default) for p in own] == [(p.name, p.kind, p.default) for p in shown]


def test_the_package_alone_loads_nothing():
    script = "import sys; before = set(sys.modules); import smolpost; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['smolpost']"
