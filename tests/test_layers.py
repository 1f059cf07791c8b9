"""DESIGN's floors: a file imports only from floors below its own, and neighbours on a floor do not know each other."""

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parent.parent / "smolpost"
FLOORS = {
    "schema": 0, "errors": 0, "registry": 0, "files": 0, "screen": 0, "signals": 0, "disks": 0, "progress": 0,
    "stage_log": 0, "third_party": 0, "hub": 0, "markdown": 0,
    "model": 1, "chat": 1, "data": 1, "objectives": 1, "merging": 1, "inference": 1,
    "training": 2, "synthesis": 2, "evaluation": 2,
    "selection": 3, "report": 3,
    "stages": 4, "recipe": 4,
    "pipeline": 5, "doctor": 5, "export": 5, "fidelity": 5, "importing": 5,
    "starting": 5, "publish": 5, "talk": 5,
    "commands": 6, "cli": 6, "train": 6, "bench": 6, "launch": 6,
}  # fmt: skip
# The exceptions on one floor.
NEIGHBOURS = {
    ("files", "errors"), ("hub", "errors"), ("hub", "files"), ("registry", "errors"), ("schema", "registry"),
    ("disks", "errors"), ("stage_log", "files"), ("progress", "stage_log"), ("data", "chat"),
    ("merging", "model"), ("inference", "model"), ("inference", "chat"), ("inference", "objectives"),
    ("recipe", "stages"), ("doctor", "pipeline"), ("importing", "pipeline"), ("starting", "pipeline"),
    ("starting", "importing"), ("cli", "commands"), ("commands", "cli"), ("train", "cli"), ("bench", "train"),
    ("launch", "cli"), ("launch", "train"),
}  # fmt: skip


def imports(file: Path) -> set[str]:
    """Top-level rooms of smolpost that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module != "smolpost" else [f"smolpost.{alias.name}" for alias in node.names]
        else:
            continue
        found.update(name.split(".")[1] for name in names if name.startswith("smolpost."))
    return found - {"__version__"}


def room(file: Path) -> str:
    return file.relative_to(LIBRARY).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", sorted(LIBRARY.rglob("*.py")), ids=lambda f: str(f.relative_to(LIBRARY)))
def test_imports_go_down(file):
    own = room(file)
    if own == "__init__":
        assert imports(file) == set()
        return
    for other in imports(file) - {own}:
        below = FLOORS[other] < FLOORS[own]
        assert below or (own, other) in NEIGHBOURS, (
            f"{own} (floor {FLOORS[own]}) imports {other} (floor {FLOORS[other]})"
        )


def test_only_recipe_knows_hydra():
    for file in LIBRARY.rglob("*.py"):
        if room(file) != "recipe":
            assert "omegaconf" not in file.read_text() and "import hydra" not in file.read_text(), file


@pytest.mark.parametrize("folder", ["data_gen", "merge"])
def test_jobs_are_thin(folder):
    for file in (LIBRARY.parent / folder).glob("*"):
        if file.suffix != ".py":
            continue
        tree = ast.parse(file.read_text())
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree)), file
        assert len(file.read_text().splitlines()) <= 80, file
        assert file.name != "__init__.py"


KINDS = {"tasks", "init", "sft", "apo", "pairs", "merge", "mergekit", "sweep", "greedy", "released"}


PLACES = ["pipeline", "recipe", "commands", "cli.py", "train.py", "launch.py", "schema.py", "doctor"]


@pytest.mark.parametrize("place", PLACES)
def test_no_stage_kind_is_named_outside_its_file(place):
    """What runs, plans and checks stages asks them; it knows none by name, class or module."""
    files = [LIBRARY / place] if place.endswith(".py") else sorted((LIBRARY / place).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare) and any(getattr(part, "attr", "") == "kind" for part in ast.walk(node)):
                compared = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                assert not compared & KINDS, (file, node.lineno)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smolpost.stages"):
                assert node.module in ("smolpost.stages", "smolpost.stages.base"), (file, node.lineno)
            if isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                assert not name.endswith("Stage") or name == "Stage", (file, node.lineno)
