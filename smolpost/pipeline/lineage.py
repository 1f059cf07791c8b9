"""Where every stage's result lies and under which key: what a result depends on, and nothing else."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from smolpost import disks, schema
from smolpost.chat.render import load_template
from smolpost.data.mixtures import rows_alone
from smolpost.data.sources import fingerprint
from smolpost.errors import UserError
from smolpost.evaluation import results
from smolpost.evaluation.task import EvaluationTask
from smolpost.files import MANIFEST, verify
from smolpost.pipeline import manifest
from smolpost.pipeline.code import code_version
from smolpost.pipeline.manifest import digest
from smolpost.pipeline.plan import StagePlan, plan
from smolpost.recipe import Request, masked
from smolpost.screen import command_line

ROWS = ("data/mixtures.py",)
MODEL = ("model/__init__.py",)
CHOOSING = ("evaluation/run.py", "inference/local.py", "selection/live.py", "model/loading.py", *ROWS)
CODE = {  # where the code that decides a step's result begins; what it imports counts with it
    "tasks": ("data/tasks.py",),
    "init": ("chat/tokenizer.py", "chat/render.py", *MODEL, *ROWS),
    "tokenize": ("data/shards.py", "data/hygiene.py"),
    "prepare": ("data/prepare.py", *ROWS),
    "sft": ("training/train.py",),
    "apo": ("training/train.py",),
    "reference": ("training/reference.py", *MODEL),
    "pairs": ("synthesis/pairs.py", "model/loading.py", *ROWS),
    "merge": ("merging/linear.py", "merging/trajectory.py"),
    "mergekit": ("merging/mergekit/methods.py",),
    "sweep": ("selection/sweep.py", *CHOOSING),
    "greedy": ("selection/greedy.py", *CHOOSING),
    "task": ("evaluation/run.py", "inference/local.py", "model/loading.py", *ROWS),  # and the task's own file
}
# Settings of a training stage that decide its prepared rows.
PREPARING = (
    "template",
    "today",
    "train_roles",
    "train_reasoning",
    "last_turn_only",
    "max_seq_len",
    "overlong",
    "packing",
)


@dataclass(frozen=True)
class Located:
    """A stage of the plan with its place on disk.

    Attributes:
        plan: The stage.
        key: Its cache key; another key is another folder, so nothing finished is ever overwritten.
        folder: run_dir/pipeline/NAME-KEY.
        prepared: Folder of the prepared rows of a training stage, else None.
        evaluation: Task name -> folder of what it measures of the stage's model; empty where no model is made.
        inputs: Checkpoint name -> folder or Hub id, with its weight.
        data: The mixtures the stage reads, by name, with every path resolved.
        parent_keys: Parent's name -> its key; for the manifest.
        shown: The stage's settings for people and for the manifest; those of the environment by the variable's name.
    """

    plan: StagePlan
    key: str
    folder: Path
    prepared: Path | None
    evaluation: dict[str, Path]
    inputs: dict[str, tuple[str, float]]
    data: dict[str, schema.Mixture]
    parent_keys: dict[str, str]
    shown: dict

    def finished(self) -> bool:
        return (manifest.read(self.folder) or {}).get("key") == self.key

    def evaluated(self) -> bool:
        return all(results.read(folder) for folder in self.evaluation.values())


class Lineage:
    """Keys and folders of all stages of one request, worked out parents first.

    Raises:
        UserError: A data file does not exist, a local base checkpoint has no manifest, or a stage would go on under
            another chat template than its parent was trained with.
    """

    def __init__(self, request: Request):
        self.recipe, self.overrides, self.environment = request.recipe, request.overrides, request.environment
        self.root = disks.run_dir = Path(self.recipe.run_dir) / self.recipe.pipeline
        self.stages: dict[str, Located] = {}
        self._fingerprints: dict[str, str] = {}
        for stage in plan(request):
            self.stages[stage.name] = self._locate(stage)
        for name, located in self.stages.items():  # what a model is measured on may come from a later stage
            self.stages[name] = dataclasses.replace(located, evaluation=self._evaluation(located))

    def mixture(self, name: str) -> schema.Mixture:
        """The mixture with the paths of stage outputs and data files filled in."""
        mixture = self.recipe.data[name]
        sources = {}
        for key, source in mixture.sources.items():
            if source.stage is not None:
                path = str(self.stages[source.stage].folder / source.path)
                source = dataclasses.replace(source, path=path, stage=None)
            sources[key] = source
        return dataclasses.replace(mixture, sources=sources)

    def require(self, name: str) -> None:
        """Refuse to start from a stage that is not finished, or whose files are no longer those that it wrote.

        Raises:
            UserError: With the remedy.
        """
        if name == "checkpoint":
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
        for name in dict.fromkeys([*stage.plan.weights, *stage.plan.parents]):
            self.require(name)

    def _locate(self, stage: StagePlan) -> Located:
        config, kind = stage.config, stage.config.kind
        if isinstance(config, schema.TrainStage):
            self._check_template(stage.stage, config)
        mixtures = [name for _, name in config.mixtures()]
        read = [self.recipe.data[name] for name in mixtures]
        if kind == "init":
            read = [rows_alone(mixture) for mixture in read]
        parent_keys = {name: self._checkpoint_key(name) for name in stage.weights}
        parts = {"kind": kind, "parents": parent_keys, "seed": stage.seed, "code": code_version(*CODE[kind])}
        prepared = None
        if isinstance(config, schema.TrainStage):
            prepare_key = self._prepare_key(config)
            prepared = self.root / "prepared" / f"{stage.stage}-{prepare_key}"
            parts |= {
                "prepared": prepare_key,
                "config": _keyed(config, without=(*PREPARING, "seeds", "init_from", "data")),
            }
        else:
            parts |= {"config": _keyed(config, without=()), "data": [self._mixture_key(m) for m in read]}
        if kind == "tasks":
            parts["files"] = [_file_key(config, name) for name in config.files]
        if kind in ("init", "pairs"):
            parts["template"] = load_template(config.template)
        if kind == "init":
            parts["architecture"] = self.recipe.model.architecture
        if kind == "merge":
            parts["weights"] = stage.weights
        if kind == "mergekit" and config.config:
            parts["config_file"] = self._fingerprint(schema.Source(path=config.config))
        if isinstance(config, schema.ChoosingStage):
            parts["sides"] = stage.sides
            parts["tasks"] = {task: self._task_parts(task, config.seed) for task in config.tasks()}
        key = digest(parts)
        return Located(
            plan=stage,
            key=key,
            folder=self.root / f"{stage.name}-{key}",
            prepared=prepared,
            evaluation={},
            inputs={name: (self._checkpoint(name), weight) for name, weight in stage.weights.items()},
            data={name: self.mixture(name) for name in mixtures},
            parent_keys=parent_keys | {name: self.stages[name].key for name in stage.data_stages},
            shown=masked(dataclasses.asdict(config), f"stages.{stage.stage}", self.environment),
        )

    def _checkpoint(self, name: str) -> str:
        return self.recipe.model.checkpoint if name == "checkpoint" else str(self.stages[name].folder)

    def _checkpoint_key(self, name: str) -> str:
        if name != "checkpoint":
            return self.stages[name].key
        checkpoint = self.recipe.model.checkpoint
        if not Path(checkpoint).is_dir():
            return f"{checkpoint}@{self.recipe.model.revision or 'main'}"
        found = manifest.read(Path(checkpoint))
        if found is None:
            raise UserError(
                f"model.checkpoint={checkpoint} has no {MANIFEST}: it is unfinished, or comes from elsewhere; "
                f"`{command_line(['smolpost', 'adopt', checkpoint])}` checks its files and writes one"
            )
        return found["key"]

    def _check_template(self, name: str, config: schema.TrainStage) -> None:
        """Refuse another template than the parent's; a base checkpoint's own is known when its rows are prepared."""
        parent = config.init_from
        while parent != "checkpoint" and self.stages[parent].plan.config.kind == "merge":
            parent = self.stages[parent].plan.base
        if parent == "checkpoint" or not isinstance(self.stages[parent].plan.config, schema.TrainStage):
            return
        trained_with = self.stages[parent].plan.config.template
        if load_template(trained_with) != load_template(config.template) and not config.allow_template_change:
            raise UserError(
                f"stages.{name}.template={config.template}, but {config.init_from} was trained with {trained_with}; "
                f"set the same one, or stages.{name}.allow_template_change=true where the change is meant"
            )

    def _mixture_key(self, mixture: schema.Mixture) -> str:
        sources = {key: self._source_key(source) for key, source in mixture.sources.items()}
        order = list(sources)
        return digest([dataclasses.asdict(mixture) | {"sources": sources}, order, self._against(mixture)])

    def _against(self, mixture: schema.Mixture) -> list[str]:
        """Content of the evaluation files that the mixture's rows are held against."""
        return [self._fingerprint(schema.Source(path=path)) for path in mixture.hygiene.against]

    def _source_key(self, source: schema.Source, **changes) -> list:
        """The source's rows by their content, and its settings."""
        rows = self._stage_rows(source) if source.stage else self._fingerprint(source)
        return [rows, dataclasses.asdict(source) | ({} if source.stage else {"path": None}) | changes]

    def _stage_rows(self, source: schema.Source) -> str:
        """Key of rows that a stage writes; files of synthetic tasks have one each, as each is drawn by itself."""
        stage = self.stages[source.stage]
        config, name = stage.plan.config, source.path.removesuffix(".jsonl")
        drawn_alone = isinstance(config, schema.TasksStage) and name in config.files
        return _file_key(config, name) if drawn_alone else stage.key

    def tokenized(self, stage: Located, source: str, tokenizer: str) -> Path:
        """Folder of a source's tokenized rows, which every stage shares that reads and renders them alike.

        Args:
            source: Name in the stage's mixture.
            tokenizer: All that decides how it renders and tokenizes.
        """
        config = stage.plan.config
        mixture = self.recipe.data[config.data]
        selecting = dict.fromkeys(("max_tokens", "weight", "share", "loss_weight", "think_share"))
        rendering = ("kind", "today", "train_roles", "train_reasoning", "last_turn_only")
        key = digest(
            {
                "source": self._source_key(mixture.sources[source], **selecting),
                "rendering": {name: getattr(config, name) for name in rendering},
                "hygiene": [mixture.hygiene, *self._against(mixture)],
                "tokenizer": tokenizer,
                "code": code_version(*CODE["tokenize"]),
            }
        )
        return self.root / "tokenized" / f"{source}-{key}"

    def _fingerprint(self, source: schema.Source) -> str:
        identity = f"{source.path}@{source.revision}/{source.subset}/{source.split}"
        if identity not in self._fingerprints:
            self._fingerprints[identity] = fingerprint(source)
        return self._fingerprints[identity]

    def _prepare_key(self, config: schema.TrainStage) -> str:
        settings = {name: getattr(config, name) for name in PREPARING if hasattr(config, name)}
        return digest(
            {
                "kind": config.kind,
                "tokenizer": self._tokenizer_key(config.init_from),
                "settings": settings,
                "template": load_template(config.template),
                "data": self._mixture_key(self.recipe.data[config.data]),
                "code": code_version(*CODE["prepare"]),
            }
        )

    def _tokenizer_key(self, name: str) -> str:
        """Key of the checkpoint whose tokenizer `name` passes on: training changes at most its eos_token, and that only
        where the template does not write it; merging changes nothing."""
        while name != "checkpoint" and self.stages[name].plan.base:
            name = self.stages[name].plan.base
        return self._checkpoint_key(name)

    def _evaluation(self, stage: Located) -> dict[str, Path]:
        if stage.plan.config.kind not in schema.MODEL_KINDS:
            return {}
        return self._measured(stage.folder.name, stage.plan.stage)

    def evaluation_of(self, name: str) -> tuple[Path, dict[str, Path]]:
        """Where a stage's model is measured, or the "checkpoint" that the pipeline starts from.

        Returns:
            The model's folder, and the folder in it of every task.

        Raises:
            UserError: There is no such model, or the recipe has nothing to measure of it.
        """
        if name == "checkpoint":
            if not self.recipe.model.checkpoint:
                raise UserError("stage=checkpoint, but model.checkpoint has no value; give it as model.checkpoint=ID")
            model = f"checkpoint-{digest(self._checkpoint_key(name))}"
            folders = self._measured(model)
        else:
            model, folders = self.stages[name].folder.name, self.stages[name].evaluation
            if self.stages[name].plan.config.kind not in schema.MODEL_KINDS:
                kind = self.stages[name].plan.config.kind
                raise UserError(f"stage={name} of kind {kind} makes no model to evaluate")
        if not folders and self.recipe.harness.kind == "none":
            raise UserError(f"evaluation.tasks holds no task for {name}; add one, or choose another stage or a harness")
        return self.root / "evaluations" / model, folders

    def measured_on(self, name: str) -> set[str]:
        """Plans whose output files the evaluation of a stage's model reads."""
        tasks = [self.recipe.evaluation.tasks[task] for task in self.stages[name].evaluation]
        mixtures = [self.recipe.data[mixture] for task in tasks for _, mixture in task.mixtures()]
        return {source.stage for mixture in mixtures for source in mixture.sources.values() if source.stage}

    def _measured(self, model: str, stage: str | None = None) -> dict[str, Path]:
        """Folder of every task for a model, by its name and key; without the tasks that leave its stage out."""
        folders = {}
        for name, task in self.recipe.evaluation.tasks.items():
            measured = task.stages is not None and (stage is None or not task.stages or stage in task.stages)
            if measured:
                key = digest(self._task_parts(name, self.recipe.evaluation.seed))
                folders[name] = self.root / "evaluations" / model / f"{name}-{key}"
        return folders

    def _task_parts(self, name: str, seed: int) -> dict:
        """All that decides what a task measures, but the model."""
        task = self.recipe.evaluation.tasks[name]
        file = f"{type(task).__module__.removeprefix('smolpost.').replace('.', '/')}.py"
        return {
            "task": _keyed(task, without=()),
            "today": self.recipe.evaluation.today,
            "seed": seed,
            "data": [self._mixture_key(self.recipe.data[mixture]) for _, mixture in task.mixtures()],
            "files": [self._fingerprint(schema.Source(path=path)) for _, path in task.files()],
            "code": code_version(*CODE["task"], file),
        }


def _file_key(config: schema.TasksStage, name: str) -> str:
    """Key of one file of synthetic tasks; its blocks count in their order."""
    file = config.files[name]
    return digest([config.seed, name, file.replay, list(file.blocks.items()), code_version(*CODE["tasks"])])


def _keyed(config: schema.Stage | EvaluationTask, without: tuple[str, ...]) -> dict:
    """The settings that can change a stage's or task's result."""
    fields = [f for f in dataclasses.fields(config) if f.metadata.get("in_key", True) and f.name not in without]
    return {f.name: getattr(config, f.name) for f in fields}
