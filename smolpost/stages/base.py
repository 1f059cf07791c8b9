"""What a stage kind is: a dataclass of its fields, with its checks, inputs, key, commands and work.

A kind is one file: a subclass of `Stage` under `@stage_kind`. Its module is imported whenever a recipe is read, so what
takes long to import (torch, transformers) is imported inside the methods that need it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from smolpost.errors import UserError
from smolpost.registry import STAGE_KINDS, check_dataclass, check_defined
from smolpost.schema import MISSING, Mixture, Recipe

CHECKPOINT = "checkpoint"  # stands for model.checkpoint wherever a stage may be named


def stage_kind(cls: type["Stage"]) -> type["Stage"]:
    """Register a stage kind under the value of its field `kind`.

    Raises:
        UserError: The class is not a dataclass, so that its fields would be lost, or it has no work.
    """
    check_dataclass(cls)
    check_defined(cls, Stage, "make")
    return STAGE_KINDS.add(cls.kind, cls)


class Keys(Protocol):
    """What decides results, as short texts that differ where the results may: for `Stage.key_parts`."""

    recipe: Recipe

    def mixture(self, mixture: Mixture) -> str:
        """Content and settings of a mixture's rows."""

    def file(self, path: str) -> str:
        """Content of a file."""

    def task(self, name: str, seed: int) -> dict:
        """All that decides what an evaluation task measures, but the model."""

    def tokenizer(self, name: str) -> str:
        """The tokenizer of a stage's model, or of the checkpoint."""

    def model(self, name: str) -> str:
        """The model of a planned stage, or the checkpoint that the pipeline starts from."""

    def checkpoint(self, key: str, place: str, revision: str | None) -> str:
        """A checkpoint of `Stage.checkpoints`."""


@dataclass(frozen=True)
class Planned:
    """One stage to run, for one seed.

    Attributes:
        name: The stage's name, with `-SEED` where the stage has several seeds.
        entry: Its name under `stages` in the recipe.
        seed: Training seed, or None for kinds without one.
        config: What the recipe says there.
        weights: Name of a planned stage, or "checkpoint", that it reads -> weight; 1 where the stage starts from it.
        base: The input that the result's config and tokenizer come from, or None for kinds that make no model.
        data_stages: Names of the planned stages whose output files this one reads.
        making: Command lines in order, as a user would type them.
        measuring: The command line that evaluates the model, or None for kinds that make none.
    """

    name: str
    entry: str
    seed: int | None
    config: "Stage"
    weights: dict[str, float]
    base: str | None
    data_stages: tuple[str, ...]
    making: tuple[tuple[str, ...], ...]
    measuring: tuple[str, ...] | None

    @property
    def commands(self) -> tuple[tuple[str, ...], ...]:
        return (*self.making, *([self.measuring] if self.measuring else []))

    @property
    def parents(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*(name for name in self.weights if name != CHECKPOINT), *self.data_stages]))


class Replies(NamedTuple):
    """Where the replies of one teacher of a stage lie. They outlive the stage's other settings.

    Attributes:
        folder: Its name ends in a hash of `parts`.
        parts: What decides the replies (`Stage.reply_parts`).
    """

    folder: Path
    parts: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a stage gets to do its work.

    Attributes:
        stage: Which one, for which seed.
        recipe: The whole recipe.
        inputs: Folder of every checkpoint that it starts from, by name.
        data: The mixtures that it reads, by name, with the paths of all files filled in.
        rows: Name of any mixture -> its (source, row) pairs, in the mixture's order.
        prompts: The same of rows that are only to be answered, so that they need no reply.
        folder: Where it writes: an empty folder, or for `Stage.RESUMABLE` kinds what an earlier try left there.
        place: Where that folder lies when the stage is finished.
        prepared: Folder of its prepared rows, or None.
        root: The pipeline's folder, for what stages share.
        checkpoints: Folder of every checkpoint of `Stage.checkpoints`, by key.
        replies: Role of a teacher that it asks -> where its replies lie.
    """

    stage: Planned
    recipe: Recipe
    inputs: dict[str, Path]
    data: dict[str, Mixture]
    rows: Callable[[str], list[tuple[str, dict]]]
    prompts: Callable[[str], list[tuple[str, dict]]]
    folder: Path
    place: Path
    prepared: Path | None
    root: Path
    checkpoints: dict[str, Path] = field(default_factory=dict)
    replies: dict[str, Replies] = field(default_factory=dict)


@dataclass
class Stage:
    """The fields that a kind has in a recipe, and what the pipeline asks of it.

    Attributes:
        VERSION: Of the kind's result: raised when the same settings and inputs give another result than before, so that
            nothing finished is reused for it. A golden test asks for it.
        MAKES_MODEL: The folder holds a model that is worth evaluating.
        RESUMABLE: The work goes on with what an earlier try left in the folder; otherwise it begins in an empty folder.
        LAUNCHED: The work runs on all ranks of `accelerate launch`.
        SCRIPT: The job under data_gen/ or merge/ that does the work; None: `smolpost make` does it.
    """

    kind: str = MISSING

    VERSION: ClassVar[int] = 1
    MAKES_MODEL: ClassVar[bool] = False
    RESUMABLE: ClassVar[bool] = False
    LAUNCHED: ClassVar[bool] = False
    SCRIPT: ClassVar[str | None] = None

    # ------------------------------------------------------------ inputs

    def parents(self) -> list[tuple[str, str]]:
        """(key, stage name or "checkpoint") of every checkpoint that the stage reads."""
        return []

    def checkpoints(self) -> list[tuple[str, str, str | None]]:
        """(key, folder or Hub id, revision) of every checkpoint that the stage itself takes from elsewhere."""
        return []

    def mixtures(self) -> list[tuple[str, str]]:
        """(key, mixture name) of every mixture under `data` that the stage reads."""
        return []

    def rows_read(self, mixture: Mixture) -> Mixture:
        """The mixture without settings that this kind does not read."""
        return mixture

    def tasks_measured(self) -> list[str]:
        """Names of the evaluation tasks that the stage measures while it is made."""
        return []

    def seeds_to_run(self) -> list[int | None]:
        """One planned stage for each."""
        return [None]

    def input_weights(self, entry: str, stages: Mapping[str, "Stage"]) -> dict[str, float]:
        """`Planned.weights` of the stage that the recipe calls `entry`.

        Raises:
            UserError: An input has several seeds.
        """
        for key, parent in self.parents():
            if len(found := leaves(parent, stages)) > 1:
                raise UserError(
                    f"stages.{entry}.{key}={parent} has several seeds ({', '.join(found)}); soup them in a merge "
                    "stage first"
                )
        return {parent: 1.0 for _, parent in self.parents()}

    def base_input(self, stages: Mapping[str, "Stage"]) -> str | None:
        """`Planned.base`."""
        return None

    def mean_of(self) -> dict[str, float] | None:
        """Stage or "checkpoint" -> weight where the model is no more than the weighted mean of these; else None.

        A merge of such a model sums the inputs themselves, so that it rounds once and not twice.
        """
        return None

    def template_of(self, stages: Mapping[str, "Stage"]) -> str | None:
        """Name of the chat template that the model was trained with, where the recipe says it."""
        return None

    # ------------------------------------------------------------ checks

    def folder_names(self) -> dict[str, list[str]]:
        """Key -> names of the user's choice that become files."""
        return {}

    def nested_settings(self) -> list[tuple[str, dict[str, Any], type, str]]:
        """(key, settings, dataclass, words) of every field whose keys are the fields of another registered entry.

        The words name what chooses the dataclass, e.g. "loss=robust".
        """
        return []

    def check(self, key: str, recipe: Recipe, place: Callable[[str], str]) -> None:
        """Refuse settings that cannot be meant; types, choices and intervals are checked already.

        Args:
            key: `stages.NAME`.
            place: Full key -> the file that wrote it, or "the command line".
        Raises:
            Wrong: With the key below `key`, the value and what would do.
        """

    def notes(self, recipe: Recipe) -> list[str]:
        """Lines for the plan, beside the stage's settings."""
        return []

    def reply_notes(self, replies: Mapping[str, Replies]) -> list[str]:
        """Lines for the plan about the teachers that the stage asks, and their replies so far."""
        return []

    def check_plan(self, entry: str, recipe: Recipe) -> None:
        """Refuse what does not fit the other stages or the launch; all names exist, and nothing depends on itself.

        Raises:
            UserError: With the remedy.
        """

    def check_installed(self, entry: str) -> None:
        """Refuse, before a run makes anything, what needs a package that is not installed here.

        Raises:
            UserError: With the command that installs it.
        """

    # ------------------------------------------------------------ key

    def key_parts(self, keys: Keys, stage: Planned) -> dict[str, Any]:
        """What the key hangs on beside kind, version, seed, parents, fields and data."""
        return {}

    def keyed_fields(self) -> dict[str, Any]:
        """The fields that can change the result."""
        return keyed(self)

    def prepared_parts(self, keys: Keys) -> dict[str, Any] | None:
        """What the key of the stage's prepared rows hangs on; None where the kind prepares none."""
        return None

    def reply_parts(self, keys: Keys, stage: Planned) -> dict[str, dict[str, Any]]:
        """Role of a teacher that the stage asks -> what decides its replies; empty where the kind asks none."""
        return {}

    def file_parts(self, path: str) -> list | None:
        """What one of the files hangs on, where that is less than the stage's whole key; else None."""
        return None

    # ------------------------------------------------------------ work

    def make(self, work: Work) -> dict[str, Any]:
        """Write the stage's files into `work.folder`.

        Returns:
            A report for the manifest, fit for JSON.
        Raises:
            UserError: Something cannot be used.
        """
        raise NotImplementedError

    def generate(self, work: Work, task: int | None) -> None:
        """Only ask the teachers, about one part of the prompts, so that several hosts can share the work.

        Args:
            task: Which part, counted from 0; None: all parts.
        Raises:
            UserError: The kind asks no teacher, or what the asking raises.
        """
        raise UserError(f"stage={work.stage.name} of kind {self.kind} asks no teacher; `smolpost make` makes it")

    def preview(self, work: Work, rows: int) -> None:
        """Show what the stage would make of a few prompts, and keep nothing.

        Raises:
            UserError: The kind asks no teacher, or what the asking raises.
        """
        raise UserError(f"stage={work.stage.name} of kind {self.kind} asks no teacher, so it has no preview")

    def sketch(self, recipe: Recipe, out: Path) -> None:
        """Write config and tokenizer of the model that the stage would make, without its weights and its data.

        Asked of kinds that make a model from nothing: without base and checkpoints.

        Raises:
            UserError: They are not known before the stage is made.
        """
        raise UserError(
            f"a stage of kind {self.kind} has to be made before its model is known; `smolpost run` makes it"
        )

    def tidy(self, folder: Path) -> None:
        """Remove what only an unfinished stage needs; the manifest is written."""


def keyed(config: Any) -> dict[str, Any]:
    """The fields of a stage or an evaluation task that can change its result, those of nested settings, too."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata.get("in_key", True)}
    return {name: keyed(value) if dataclasses.is_dataclass(value) else value for name, value in fields.items()}


def leaves(parent: str, stages: Mapping[str, Stage]) -> list[str]:
    """Names of the planned stages of a stage: its own, or one for each of several seeds."""
    seeds = stages[parent].seeds_to_run() if parent in stages else [None]
    return [f"{parent}-{seed}" for seed in seeds] if len(seeds) > 1 else [parent]


def summed(inputs: Mapping[str, float], stages: Mapping[str, Stage]) -> dict[str, float]:
    """Checkpoints behind weighted inputs: a plain mean (`Stage.mean_of`) is taken apart, seeds share equally."""
    flat: dict[str, float] = {}
    for parent, weight in inputs.items():
        mean = stages[parent].mean_of() if parent in stages else None
        if mean is not None:
            shares = summed(mean, stages)
        else:
            names = leaves(parent, stages)
            shares = dict.fromkeys(names, 1 / len(names))
        for name, share in shares.items():
            flat[name] = flat.get(name, 0.0) + weight * share
    return flat


def base_leaf(base: str, stages: Mapping[str, Stage]) -> str:
    """The planned stage behind a merge's `base`: a plain mean has its own base's config and tokenizer."""
    while base in stages and stages[base].mean_of() is not None:
        base = stages[base].base
    return leaves(base, stages)[0]
