"""The documentation tells the truth: its commands run and print what the pages say, and its links lead somewhere."""

import ast
import re
import sys
from pathlib import Path

import pytest

from smolpost import cli, registry
from tests.page_files import write_inputs
from tests.pages import PAGES, Reader, blocks, check_meaning, commands, write_files
from tests.small import ROOT, call

IDS = [str(page.relative_to(ROOT)) for page in PAGES]
TYPED = [page for page in PAGES if any(b.language == "console" and not b.not_run for b in blocks(page))]


@pytest.fixture(autouse=True)
def no_plugin_stays(monkeypatch):
    """What the plugins of a page register is there in its test alone."""
    for entries in (kind for kind in vars(registry).values() if isinstance(kind, registry.Registry)):
        monkeypatch.setattr(entries, "_entries", dict(entries))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "." not in name and (Path.cwd() / f"{name}.py").is_file():
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_means_something(page, tmp_path, monkeypatch):
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        typed = block.language == "console" and not block.not_run  # the next test runs it
        made = {f"pipeline={name}" for name in re.findall(r"smolpost new (\S+)", block.text)}
        for command in commands(block):
            if command.line.startswith(("smolpost ", "python ", "accelerate ")):
                check_meaning(command.line, is_planned=not typed and made.isdisjoint(command.line.split()))


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if "<!-- slow" in p.read_text() else []) for p in TYPED],
)
def test_commands_print_what_the_page_says(page, tmp_path, monkeypatch):
    folder, tools = tmp_path / "here", tmp_path / "bin"
    folder.mkdir(), tools.mkdir()
    write_inputs(folder)
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


def test_every_verb_is_shown():
    lines = [command.line for page in PAGES for block in blocks(page) for command in commands(block)]
    assert {match[1] for line in lines if (match := re.search(r"\bsmolpost +([\w-]+)", line))} >= set(cli.VERBS)


def test_each_message_in_troubleshooting_is_one_that_the_library_has():
    """A message is found by its words: those of one string of the source, with `...` for values."""
    texts = {message for file in (ROOT / "smolpost").rglob("*.py") for message in _strings(file)}
    quoted = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(quoted) >= 70
    for message in quoted:
        words = re.compile(r".*?".join(re.escape(part.strip(" ")) for part in message.split("...")), re.DOTALL)
        assert any(words.search(text) for text in texts), message


def _strings(file):
    """The strings of a file's code; an f-string with a NUL for each value."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_site_has_every_page_and_no_dead_link(tmp_path):
    """It is built as `make docs` builds it, and its pages load nothing from another host."""
    done = call([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")])
    assert done.returncode == 0, done.stderr
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} | {"messages.md"}
    assert sorted(re.findall(r"- (\w+\.md)", nav)) == sorted(pages)
    refusals = (tmp_path / "site" / "messages.html").read_text()
    assert refusals.count("<li><code>") > 600
    assert "<code>...: is empty; expected at least one row; delete the file or write it again</code>" in refusals
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*"
        assert re.findall(loaded, page.read_text()) == [], page.name
    assert (tmp_path / "site" / "search" / "search_index.json").is_file()
