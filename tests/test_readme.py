"""README tells the truth: its folder map and the miniature's numbers. test_docs.py has its commands and links."""

import io
import re
from pathlib import Path

from rich.console import Console

from smolpost.screen import Blocks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MINIATURE = (ROOT / "docs" / "miniature.md").read_text()


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


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE):
        assert target in targets, target
