"""Where every stage's result lies and under which key: what a result depends on, and nothing else."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from smolpost import disks, schema, stage_log
from smolpost.data.paths import is_hub_id
from smolpost.data.sources import fingerprint
from smolpost.errors import UserError
from smolpost.evaluation import results
from smolpost.files import MANIFEST, Hashes, digest, verify
from smolpost.hub import Commits, Kind
from smolpost.pipeline import manifest
from smolpost.pipeline.plan import plan
from smolpost.recipe import Request, masked
from smolpost.registry import ROW_SHAPES
from smolpost.screen import command_line
from smolpost.stages.base import CHECKPOINT, Planned, Replies, keyed

HUB = "hub.json"  # in the pipeline's folder: commits of its names on the Hub
HASHES = "hashes.json"  # in the pipeline's folder: of the files that its keys have read


@dataclass(frozen=True)
class Located(Planned):
    """A planned stage with its place on disk.

    Attributes:
        key: Its cache key; another key is another folder, so nothing finished is ever overwritten.
        folder: run_dir/pipeline/NAME-KEY.
        prepared: Folder of its prepared rows, or None for kinds without them.
        inputs: Checkpoint name -> folder or Hub id, with its weight.
        data: The mixtures the stage reads, by name, with every path resolved.
        replies: Role of a teacher that the stage asks -> where its replies lie.
        parent_keys: Parent's name -> its key; for the manifest.
        shown: The stage's settings for people and for the manifest; those of the environment by the variable's name.
    """

    key: str
    folder: Path
    prepared: Path | None
    inputs: dict[str, tuple[str, float]]
    data: dict[str, schema.Mixture]
    replies: dict[str, Replies]
    parent_keys: dict[str, str]
    shown: dict
    measured: Callable[[], dict[str, Path]] = field(compare=False, repr=False)

    @cached_property
    def evaluation(self) -> dict[str, Path]:
        """Task name -> folder of what it measures of the stage's model; empty where no model is made.

        Worked out when asked for, as the rows of a task may come from a later stage.
        """
        return self.measured()

    def finished(self) -> bool:
        return (manifest.read(self.folder) or {}).get("key") == self.key

    def evaluated(self) -> bool:
        return all(results.read(folder) for folder in self.evaluation.values())


class Stages(Mapping[str, Located]):
    """Planned stages by name, each located when it is first asked for, with those that it depends on."""

    def __init__(self, lineage: "Lineage", planned: list[Planned]):
        self.planned = {stage.name: stage for stage in planned}
        self._lineage, self._located = lineage, {}

    def __getitem__(self, name: str) -> Located:
        if name not in self._located:
            self._located[name] = self._lineage.locate(self.planned[name])
        return self._located[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.planned)

    def __len__(self) -> int:
        return len(self.planned)


class Lineage:
    """Keys and folders of the stages of one request. It is the `stages.base.Keys` of stage kinds.

    Args:
        look_up: Ask the Hub for commits that the pipeline does not know yet, as every command does that makes or
            measures something. Without it the names stand for them, and those stages get other keys later.
    Attributes:
        commits: Of the pipeline's names on the Hub.
        stages: Name -> the located stage; what nobody asks for is not looked at, nor is its data.

    Raises (when a stage is asked for):
        UserError: A data file does not exist, or a local base checkpoint has no manifest.
    """

    def __init__(self, request: Request, *, look_up: bool = False):
        self.recipe, self.overrides, self.environment = request.recipe, request.overrides, request.environment
        self.root = disks.run_dir = Path(self.recipe.run_dir) / self.recipe.pipeline
        self.stages = Stages(self, plan(request))
        self._fingerprints: dict[str, str] = {}
        self._hashes = Hashes(self.root / HASHES)
        self.commits, self._look_up = Commits(self.root / HUB), look_up

    # ------------------------------------------------------------ the parts of keys

    def mixture(self, mixture: schema.Mixture) -> str:
        sources = {key: self.source(source) for key, source in mixture.sources.items()}
        return digest([dataclasses.asdict(mixture) | {"sources": sources}, list(sources), self.against(mixture)])

    def file(self, path: str) -> str:
        return self._fingerprint(schema.Source(path=path))

    def task(self, name: str, seed: int) -> dict:
        task = self.recipe.evaluation.tasks[name]
        return {
            "task": keyed(task),
            "today": self.recipe.evaluation.today,
            "seed": seed,
            "data": [self.mixture(self.recipe.data[mixture]) for _, mixture in task.mixtures()],
            "files": [self.file(path) for _, path in task.files()],
            "version": task.VERSION,
        }

    def tokenizer(self, name: str) -> str:
        """Training changes at most a tokenizer's eos_token, and that only where the template does not write it; merging
        changes nothing: the key of the checkpoint that it comes from."""
        while name != CHECKPOINT and self.stages.planned[name].base:
            name = self.stages.planned[name].base
        return self.model(name)

    def source(self, source: schema.Source, without: tuple[str, ...] = ()) -> list:
        """A source's rows by their content, and its settings."""
        source = self._at_commit(source)
        rows = self._stage_rows(source) if source.stage else self._fingerprint(source)
        changes = dict.fromkeys(without) | ({} if source.stage else {"path": None})
        settings = dataclasses.asdict(source) | changes
        if not source.mode_from_reply:  # so that stages from before this field are still done
            del settings["mode_from_reply"]
        return [rows, settings, ROW_SHAPES[source.columns].VERSION]

    def against(self, mixture: schema.Mixture) -> list[str]:
        """Content of the evaluation files that hygiene compares the mixture's rows with."""
        return [self.file(path) for path in mixture.hygiene.against]

    def _stage_rows(self, source: schema.Source) -> str:
        """Key of rows that a stage writes: its own, or that of the one file."""
        parts = self.recipe.stages[source.stage].file_parts(source.path)
        return self.stages[source.stage].key if parts is None else digest(parts)

    def _fingerprint(self, source: schema.Source) -> str:
        identity = f"{source.path}@{source.revision}/{source.subset}/{source.split}"
        if identity not in self._fingerprints:
            self._fingerprints[identity] = fingerprint(source, self._hashes)
        return self._fingerprints[identity]

    def checkpoint(self, key: str, place: str, revision: str | None) -> str:
        """The commit of a checkpoint on the Hub, or the key in a folder's manifest."""
        if commit := self.commit(place, revision):
            return f"{place}@{commit}"
        found = manifest.read(Path(place))
        if found is None:
            raise UserError(
                f"{key}={place} has no {MANIFEST}: it is unfinished, or comes from elsewhere; "
                f"`{command_line(['smolpost', 'adopt', place])}` checks its files and writes one"
            )
        return found["key"]

    def model(self, name: str) -> str:
        model = self.recipe.model
        if name == CHECKPOINT:
            return self.checkpoint("model.checkpoint", model.checkpoint, model.revision)
        return self.stages[name].key

    # ------------------------------------------------------------ places

    def locate(self, stage: Planned) -> Located:
        """The stage with its key; `stages` keeps it."""
        config = stage.config
        parent_keys = {name: self.model(name) for name in stage.weights}
        parts = {
            "kind": config.kind,
            "version": config.VERSION,
            "parents": parent_keys,
            "seed": stage.seed,
            "config": config.keyed_fields(),
            **config.key_parts(self, stage),
        }
        prepared = config.prepared_parts(self)
        if prepared is None:
            parts["data"] = [self.mixture(config.rows_read(self.recipe.data[name])) for _, name in config.mixtures()]
        else:
            parts["prepared"] = digest(prepared)
        key = digest(parts)
        folder = self.root / f"{stage.name}-{key}"
        return Located(
            **{f.name: getattr(stage, f.name) for f in dataclasses.fields(Planned)},
            key=key,
            folder=folder,
            prepared=None if prepared is None else self.root / "prepared" / f"{stage.entry}-{parts['prepared']}",
            inputs={name: (self._checkpoint(name), weight) for name, weight in stage.weights.items()},
            data={name: self.filled(name) for _, name in config.mixtures()},
            replies={
                role: Replies(self.root / "replies" / f"{stage.name}-{role}-{digest(parts)}", parts)
                for role, parts in config.reply_parts(self, stage).items()
            },
            parent_keys=parent_keys | {name: self.stages[name].key for name in stage.data_stages},
            shown=masked(dataclasses.asdict(config), f"stages.{stage.entry}", self.environment),
            measured=lambda: self._measured(folder.name, stage.entry) if config.MAKES_MODEL else {},
        )

    def filled(self, name: str) -> schema.Mixture:
        """The mixture with the paths of stage outputs filled in."""
        mixture = self.recipe.data[name]
        sources = {}
        for key, source in mixture.sources.items():
            if source.stage is not None:
                path = str(self.stages[source.stage].folder / source.path)
                source = dataclasses.replace(source, path=path, stage=None)
            else:
                source = self._at_commit(source)
            sources[key] = source
        return dataclasses.replace(mixture, sources=sources)

    def commit(self, checkpoint: str, revision: str | None) -> str | None:
        """The commit of a checkpoint on the Hub; None for a folder."""
        return None if Path(checkpoint).is_dir() else self._revision("model", checkpoint, revision)

    def _at_commit(self, source: schema.Source) -> schema.Source:
        if source.stage is not None or not is_hub_id(source):
            return source
        return dataclasses.replace(source, revision=self._revision("dataset", source.path, source.revision))

    def _revision(self, kind: Kind, name: str, revision: str | None) -> str:
        if self._look_up:
            return self.commits.resolve(kind, name, revision)
        return self.commits.known(kind, name, revision) or revision or "main"

    def hub_names(self) -> list[str]:
        """ "ID@REVISION = COMMIT" of each dataset and checkpoint on the Hub."""
        sources = [source for mixture in self.recipe.data.values() for source in mixture.sources.values()]
        names = [("dataset", s.path, s.revision) for s in sources if s.stage is None and is_hub_id(s)]
        models = [c[1:] for stage in self.recipe.stages.values() for c in stage.checkpoints()]
        models += [(self.recipe.model.checkpoint, self.recipe.model.revision)]
        names += [("model", *model) for model in models if model[0] and not Path(model[0]).is_dir()]
        return [self.commits.shown(*name) for name in dict.fromkeys(names)]

    def _checkpoint(self, name: str) -> str:
        return self.recipe.model.checkpoint if name == CHECKPOINT else str(self.stages[name].folder)

    def log(self, folder: Path) -> Path:
        """The log of the stage with this folder, or with this folder of evaluations."""
        return self.root / stage_log.FOLDER / f"{folder.name}.log"

    def evaluation_of(self, name: str) -> tuple[Path, dict[str, Path]]:
        """Where a stage's model is measured, or the "checkpoint" that the pipeline starts from.

        Returns:
            The model's folder, and the folder in it of every task.

        Raises:
            UserError: There is no such model, or the recipe has nothing to measure of it.
        """
        if name == CHECKPOINT:
            if not self.recipe.model.checkpoint:
                raise UserError("stage=checkpoint, but model.checkpoint has no value; give it as model.checkpoint=ID")
            model = f"checkpoint-{digest(self.model(name))}"
            folders = self._measured(model)
        else:
            stage = self.stages[name]
            model, folders = stage.folder.name, stage.evaluation
            if not stage.config.MAKES_MODEL:
                raise UserError(f"stage={name} of kind {stage.config.kind} makes no model to evaluate")
        if not folders and self.recipe.harness.kind == "none":
            raise UserError(f"evaluation.tasks holds no task for {name}; add one, or choose another stage or a harness")
        return self.root / "evaluations" / model, folders

    def measured_on(self, name: str) -> set[str]:
        """Names of the stages whose output files the evaluation of a stage's model reads."""
        tasks = [self.recipe.evaluation.tasks[task] for task in self.stages[name].evaluation]
        mixtures = [self.recipe.data[mixture] for task in tasks for _, mixture in task.mixtures()]
        return {source.stage for mixture in mixtures for source in mixture.sources.values() if source.stage}

    def _measured(self, model: str, entry: str | None = None) -> dict[str, Path]:
        """Folder of every task for a model, by its name and key; without the tasks that leave its stage out."""
        folders = {}
        for name, task in self.recipe.evaluation.tasks.items():
            measured = task.stages is not None and (entry is None or not task.stages or entry in task.stages)
            if measured:
                key = digest(self.task(name, self.recipe.evaluation.seed))
                folders[name] = self.root / "evaluations" / model / f"{name}-{key}"
        return folders

    # ------------------------------------------------------------ what has to be there

    def require(self, name: str) -> None:
        """Refuse to start from a stage that is not finished, or whose files are no longer those that it wrote.

        Raises:
            UserError: With the remedy.
        """
        if name == CHECKPOINT:
            if Path(self.recipe.model.checkpoint).is_dir():
                verify(Path(self.recipe.model.checkpoint))
            return
        if not self.stages[name].finished():
            raise UserError(
                f"stage {name} is not finished: {self.stages[name].folder} has no {MANIFEST}; "
                f"run `{command_line(['smolpost', 'run', *self.overrides, f'stage={name}'])}` first"
            )
        verify(self.stages[name].folder)

    def require_inputs(self, stage: Located) -> None:
        """`require` everything that the stage starts from: checkpoints, and stages that write its rows."""
        for name in dict.fromkeys([*stage.weights, *stage.parents]):
            self.require(name)
        for _, place, _ in stage.config.checkpoints():
            if Path(place).is_dir():
                verify(Path(place))
