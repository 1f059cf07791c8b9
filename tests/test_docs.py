"""The documentation tells the truth: its commands run and print what the pages say, and its links lead somewhere."""

import re

import pytest

from tests.pages import PAGES, Reader, blocks, check_meaning, commands, write_files
from tests.small import ROOT

IDS = [str(page.relative_to(ROOT)) for page in PAGES]
TYPED = [page for page in PAGES if any(b.language == "console" and not b.not_run for b in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_means_something(page, tmp_path, monkeypatch):
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        typed = block.language == "console" and not block.not_run  # the next test runs it
        for command in commands(block):
            if command.line.startswith(("smolpost ", "python ", "accelerate ")):
                check_meaning(command.line, is_planned=not typed)


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if "<!-- slow" in p.read_text() else []) for p in TYPED],
)
def test_commands_print_what_the_page_says(page, tmp_path, monkeypatch):
    folder, tools = tmp_path / "here", tmp_path / "bin"
    folder.mkdir(), tools.mkdir()
    write_files(page, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    reader = Reader(folder, tools)
    for block in blocks(page):
        if block.language == "console" and not block.not_run:
            for command in commands(block):
                reader.check(command)


def test_links_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_files_named_in_documents_exist():
    named = r"`((?:tests|smolpost|benchmarks|recipes)/[\w/*.-]+\.(?:py|yaml|json))`"
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for name in re.findall(named, page.read_text()):
            assert list(ROOT.glob(name)), f"{page.name}: {name}"


def test_commands_of_every_kind_of_block_are_found():
    found = {page.stem: sum(len(commands(block)) for block in blocks(page)) for page in PAGES}
    assert found["README"] >= 8 and found["methods"] >= 10 and found["running"] >= 0
