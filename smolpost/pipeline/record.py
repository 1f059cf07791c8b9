"""The last run of a pipeline in a file of its folder, so that `smolpost status` needs no recipe."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from smolpost.files import MANIFEST, read_json, write_json
from smolpost.pipeline import manifest

if TYPE_CHECKING:  # `smolpost status` needs none of what they import
    from smolpost.pipeline.lineage import Located
    from smolpost.recipe import Request

FILE = "run.json"


class Entry(NamedTuple):
    """A stage of a run.

    Attributes:
        folder: Where its result lies or will lie.
        evaluation: Folders of what is measured of its model.
    """

    name: str
    kind: str
    folder: Path
    evaluation: list[Path]


def entry(stage: "Located") -> Entry:
    return Entry(stage.name, stage.config.kind, stage.folder, list(stage.evaluation.values()))


def words(request: "Request") -> list[str]:
    """The words of the command line that asked for it."""
    return [*request.overrides, *([f"stage={request.stage}"] if request.stage else [])]


def write(root: Path, request: "Request", stages: Iterable["Located"]) -> None:
    """
    Args:
        root: The pipeline's folder.
        stages: All that the run makes, in order.
    """
    found = [
        {
            "name": e.name,
            "kind": e.kind,
            "folder": e.folder.name,
            "evaluation": [str(folder.relative_to(root)) for folder in e.evaluation],
        }
        for e in map(entry, stages)
    ]
    write_json(root / FILE, {"words": words(request), "stages": found})


def read(root: Path) -> tuple[list[str] | None, list[Entry]]:
    """The words of the last run and its stages; None and the finished stages by their time where no run wrote them."""
    found = read_json(root / FILE)
    try:
        entries = [
            Entry(s["name"], s["kind"], root / s["folder"], [root / folder for folder in s["evaluation"]])
            for s in found["stages"]
        ]
        return list(found["words"]), entries
    except (LookupError, TypeError):  # no run, or not ours
        made = [(manifest.read(file.parent), file.parent) for file in root.glob(f"*/{MANIFEST}")]
        made = sorted((m["finished"], m["stage"], m["kind"], folder) for m, folder in made if "stage" in m)
        return None, [Entry(name, kind, folder, []) for _, name, kind, folder in made]
