"""A pipeline's stages beside the published recipe: which stage has which role, and where a value differs."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.fidelity.published import NOTHING, ROLES, ROWS, SOURCES, Row, Said
from smolpost.progress import plural
from smolpost.schema import Recipe
from smolpost.stages.base import CHECKPOINT, summed

REFERENCE = "smollm3"  # the pipeline that follows the publication


@dataclass(frozen=True)
class Cell:
    """What a source says, and whether the pipeline has another value."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Line:
    """One value: what each source says, in their order, what the pipeline has, and why ("" where nothing needs it)."""

    key: str
    what: str
    said: tuple[Cell, ...]
    ours: str
    why: str


@dataclass(frozen=True)
class Section:
    """One stage.

    Attributes:
        title: What it is in the published recipe.
        stage: Its name in the pipeline.
        changed: "KEY THEIRS -> OURS" of each value that the pipeline smollm3 has otherwise.
    """

    title: str
    stage: str
    lines: tuple[Line, ...]
    changed: tuple[str, ...]


def sections(pipeline: Recipe, stages: Collection[str] | None = None) -> list[Section]:
    """The table of a pipeline, a section for each stage that the published recipe has, too.

    Args:
        stages: Names of the pipeline's stages that are asked for; None: all.
    Raises:
        UserError: None of them is in the published recipe.
    """
    reference = recipe.load([f"pipeline={REFERENCE}"]).recipe
    ours, theirs = roles(pipeline), roles(reference)
    if stages is not None:
        ours = {role: name for role, name in ours.items() if name in stages}
    if not ours:
        asked = ", ".join(pipeline.stages if stages is None else stages) or "no stage"
        raise UserError(
            f"--fidelity has nothing to compare: {asked} of pipeline {pipeline.pipeline} is not in the published "
            "recipe; it compares mid-training and SFT (kind sft), preference training (apo) and merges (merge)"
        )
    found = []
    for role, stage in ours.items():
        lines, changed = [], []
        for row in ROWS:
            if role not in row.roles:
                continue
            value = _value(pipeline, stage, row.key)
            published = _value(reference, theirs[role], row.key)
            if value != published:
                changed.append(f"{row.key} {shown(published)} -> {shown(value)}")
            lines.append(_line(row, value, row.why if value == published else ""))
        found.append(Section(ROLES[role], stage, tuple(lines), tuple(changed)))
    return found


def roles(pipeline: Recipe) -> dict[str, str]:
    """Role in the published recipe -> the stage that has it, by what a stage is and not by its name.

    preference: the last stage of kind apo. sft: the stage of kind sft that it starts from; without a preference stage,
    the last of kind sft. mid: the stage of kind sft that SFT starts from. soup: a merge of the preference stage's seeds
    alone. merge: the last merge of several inputs.
    """
    stages = pipeline.stages

    def last(kind: str) -> str | None:
        return next((name for name in reversed(stages) if stages[name].kind == kind), None)

    def start(name: str | None) -> str | None:
        parent = stages[name].init_from if name else None
        return parent if parent in stages and stages[parent].kind == "sft" else None

    preference = last("apo")
    sft = start(preference) if preference else last("sft")
    merges = [name for name, stage in stages.items() if stage.kind == "merge"]
    found = {
        "mid": start(sft),
        "sft": sft,
        "preference": preference,
        "soup": next((name for name in merges if preference and [*stages[name].inputs] == [preference]), None),
        "merge": next((name for name in reversed(merges) if len(stages[name].inputs) > 1), None),
    }
    return {role: name for role, name in found.items() if name}


def shown(value: Any) -> str:
    """A value as a person reads it in a table."""
    if value is None:
        return "null"
    if isinstance(value, dict):  # the weights of a mixture's sets
        counts = Counter(sorted(value.values(), reverse=True))
        shares = ", ".join(f"{number} x {weight:g}" for weight, number in counts.items())
        return f"{len(value)} {plural('set', len(value))}: {shares}"
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def _line(row: Row, value: Any, why: str) -> Line:
    cells = tuple(_cell(getattr(row, source), value) for source in SOURCES)
    return Line(row.key, row.what, cells, shown(value), why)


def _cell(said: Said, ours: Any) -> Cell:
    text = said.text or shown(said.value)
    differs = said.value is not NOTHING and said.value != ours and ours not in said.also
    return Cell(f"not set: {text}" if said.unset else text, differs)


def _value(pipeline: Recipe, name: str, key: str) -> Any:
    """What the pipeline has for a `Row.key` of the stage."""
    stage, (group, _, field) = pipeline.stages[name], key.partition(".")
    if group == "data":
        mixture = pipeline.data[stage.data]
        if field == "weights":
            return {source: spec.weight for source, spec in mixture.sources.items()}
        return getattr(mixture, field)
    if group == "model":
        return getattr(pipeline.model, field)
    if key == "weights":
        shares = summed(stage.inputs, pipeline.stages) if len(stage.inputs) == 1 else stage.inputs
        equal = len(shares) > 1 and len(set(shares.values())) == 1
        return "equal" if equal else sorted(shares.values(), reverse=True)
    if key == "added":
        return _place(pipeline, min(stage.inputs, key=stage.inputs.get))
    return _place(pipeline, stage.init_from) if key == "init_from" else getattr(stage, key)


def _place(pipeline: Recipe, name: str) -> str:
    return pipeline.model.checkpoint if name == CHECKPOINT else name
