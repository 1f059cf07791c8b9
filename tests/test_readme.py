"""README tells the truth: its folder map exists, and every smolpost command in it means something."""

import io
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from smolpost import cli, recipe
from smolpost.pipeline.plan import plan, select
from smolpost.screen import Blocks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MINIATURE = (ROOT / "docs" / "miniature.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```[a-z]*\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(smolpost|accelerate launch|python data_gen|python merge) ?", line)]


def test_folder_map_is_true():
    block = README.partition("## The folders")[2].split("```")[1]
    named = [word for line in block.splitlines() for word in re.findall(r"^(?:  )?((?:[\w.]+/? )+) ", line)]
    words = [w for names in named for w in names.split()]
    assert len(words) > 12
    for word in words:
        inside = [ROOT / word, ROOT / "smolpost" / word]
        assert any(path.exists() for path in inside), word
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "..").exists() and not p.name.startswith(".")}
    mentioned = {word.rstrip("/") for word in words}
    built = {"build", "dist", "runs", "smolpost.egg-info", "__pycache__"}
    assert folders - built <= mentioned


def printed_table() -> tuple[str, list[str], list[list[str]]]:
    """The miniature's table in docs/miniature.md: the text, its heads and its cells."""
    printed = re.search(r"```\n( +mean and range.*?)```", MINIATURE, re.DOTALL)[1]
    _, tasks, metrics, _, *lines, note = printed.splitlines()
    assert note == "n and 95% intervals of each run: results.json in its folder"
    heads, task = ["stage"], ""
    for match in list(re.finditer(r"\S+", metrics))[1:]:
        above = [word for word in re.finditer(r"\S+", tasks) if word.end() == match.end()]
        task = above[0][0] if above else task
        heads.append(f"{task}\n{match[0]}")
    ends = [match.end() for match in re.finditer(r"\S+", metrics)]
    rows: list[list[str]] = []
    for line in lines:
        found = {match.end(): match[0] for match in re.finditer(r"\S+ to \S+|\S+", line)}
        if not line.startswith(" "):
            rows.append([line.split()[0], *(found[end] for end in ends[1:])])
            continue
        for column, end in enumerate(ends[1:], 1):
            rows[-1][column] += f"\n{found[end]}" if end in found else ""
    return printed, heads, rows


def test_the_miniatures_table_has_the_shape_that_compare_prints():
    printed, heads, rows = printed_table()
    title = printed.splitlines()[0].strip()
    console = Console(file=io.StringIO(), width=max(map(len, printed.splitlines())) + 2)
    console.print(Blocks(heads, rows, title=title))
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == printed.splitlines()[:-1]


def test_the_first_table_has_the_miniatures_numbers():
    _, heads, rows = printed_table()
    stages = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    columns = ["answer\nthink", "recall\n1024", "recall\n2048", "pairs\nacc."]
    short = [line.strip("| ").split("|") for line in README.splitlines() if re.match(r"\| \w+ \| \d", line)]
    assert len(short) == 5
    for stage, *values in short:
        means = [stages[stage.strip()][column].split("\n")[0] for column in columns]
        assert [value.strip() for value in values] == [mean for mean in means if mean != "-"]


def test_links_lead_to_files():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_files_named_in_documents_exist():
    named = r"`((?:tests|smolpost|benchmarks|recipes)/[\w/*.-]+\.(?:py|yaml|json))`"
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(named, page.read_text()):
            assert list(ROOT.glob(name)), f"{page.name}: {name}"


def test_there_are_commands():
    assert len(commands()) >= 6


@pytest.mark.parametrize("line", commands())
def test_commands_mean_something(line):
    words = shlex.split(line)
    if words[0] == "smolpost":
        assert words[1] in cli.VERBS
    for word in words:
        if word.endswith((".yaml", ".py")):
            assert (ROOT / word).is_file(), word
    overrides = [word for word in words if "=" in word and not word.startswith(("-", "preview="))]
    if overrides and words[1] != "merge":  # its words are folders and weights
        request = recipe.load(overrides)
        assert select(plan(request), request.stage)


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE):
        assert target in targets, target
