"""Where every stage's result lies and under which key: what a result depends on, and nothing else."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from smolpost import schema
from smolpost.chat.render import load_template
from smolpost.data.sources import fingerprint
from smolpost.errors import UserError
from smolpost.pipeline import manifest
from smolpost.pipeline.manifest import code_version, digest
from smolpost.pipeline.plan import StagePlan, plan
from smolpost.recipe import Request

READING = (
    "data/sources.py", "data/paths.py", "data/piece.py", "data/jsonl.py", "data/arrow_rows.py", "data/rows.py",
    "data/columns.py", "data/validate.py",
)  # fmt: skip
ROWS = (*READING, "data/mixtures.py")
MODEL = ("model/configuration_smollm3.py", "model/modeling_smollm3.py", "model/register.py", "model/attention.py")
HEAD = ("objectives/head.py", "objectives/logprobs.py")
PACKS = ("data/collate.py", "data/dataset_folder.py", "data/packing.py")
TRAINING = ("chat/render.py", *MODEL, *PACKS, "objectives", "training")
TOKENIZING = ("chat", *READING, "data/tokenize.py", "data/shards.py", "data/hygiene.py", "data/overlap.py")
CODE = {  # the parts of the library that decide a step's result; tests/pipeline/test_lineage.py checks them by imports
    "tasks": ("data/tasks.py",),
    "init": ("chat", *MODEL, *ROWS),
    "tokenize": TOKENIZING,
    "prepare": (
        *TOKENIZING, "data/mixtures.py", "data/tokens.py", "data/taken.py", "data/prepare.py", "data/prepare_sft.py",
        "data/prepare_apo.py", "data/packing.py", "data/dataset_folder.py", "data/report.py", "data/collate.py",
    ),
    "sft": TRAINING,
    "apo": TRAINING,
    "reference": (
        *MODEL, *PACKS, *HEAD, "training/batches.py", "training/environment.py",
        "training/reference.py", "training/reference_cache.py", "training/scoring.py",
    ),
    "pairs": ("chat", *MODEL, "model/loading.py", "model/generation.py", *ROWS, "data/prompts.py", "synthesis"),
    "merge": ("merging",),
    "evaluate": (
        "chat", *MODEL, "model/loading.py", "model/generation.py", *ROWS, "data/prompts.py", "data/tasks.py",
        *HEAD, "evaluation",
    ),
}  # fmt: skip
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
        evaluation: File of its evaluation, or None where there is none.
        inputs: Checkpoint name -> folder or Hub id, with its weight.
        data: The mixtures the stage reads, by name, with every path resolved.
        parent_keys: Parent's name -> its key; for the manifest.
    """

    plan: StagePlan
    key: str
    folder: Path
    prepared: Path | None
    evaluation: Path | None
    inputs: dict[str, tuple[str, float]]
    data: dict[str, schema.Mixture]
    parent_keys: dict[str, str]

    def finished(self) -> bool:
        return (manifest.read(self.folder) or {}).get("key") == self.key


class Lineage:
    """Keys and folders of all stages of one request, worked out parents first.

    Raises:
        UserError: A data file does not exist, a local base checkpoint has no manifest, or a stage would go on under
            another chat template than its parent was trained with.
    """

    def __init__(self, request: Request):
        self.recipe = request.recipe
        self.root = Path(self.recipe.run_dir) / self.recipe.pipeline
        self.stages: dict[str, Located] = {}
        self._fingerprints: dict[str, str] = {}
        for stage in plan(request):
            self.stages[stage.name] = self._locate(stage)

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
        """Refuse to start from a stage that is not finished.

        Raises:
            UserError: With the command that finishes it.
        """
        if name != "checkpoint" and not self.stages[name].finished():
            raise UserError(
                f"stage {name} is not finished: {self.stages[name].folder} has no {manifest.FILE}; "
                f"run `smolpost run pipeline={self.recipe.pipeline} stage={name}` with the same settings first"
            )

    def _locate(self, stage: StagePlan) -> Located:
        config, kind = stage.config, stage.config.kind
        if isinstance(config, schema.TrainStage):
            self._check_template(stage.stage, config)
        mixtures = [name for _, name in config.mixtures()]
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
            parts |= {"config": _keyed(config, without=()), "data": [self._mixture_key(m) for m in mixtures]}
        if kind in ("init", "pairs"):
            parts["template"] = load_template(config.template)
        if kind == "init":
            parts["architecture"] = self.recipe.model.architecture
        if kind == "merge":
            parts["weights"] = stage.weights
        key = digest(parts)
        return Located(
            plan=stage,
            key=key,
            folder=self.root / f"{stage.name}-{key}",
            prepared=prepared,
            evaluation=self._evaluation(stage, key),
            inputs={name: (self._checkpoint(name), weight) for name, weight in stage.weights.items()},
            data={name: self.mixture(name) for name in mixtures},
            parent_keys=parent_keys | {name: self.stages[name].key for name in stage.data_stages},
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
                f"model.checkpoint={checkpoint} has no {manifest.FILE}: it is unfinished, or comes from elsewhere; "
                f"`smolpost adopt {checkpoint}` checks its files and writes one"
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

    def _mixture_key(self, name: str) -> str:
        mixture = self.recipe.data[name]
        sources = {key: self._source_key(source) for key, source in mixture.sources.items()}
        order = list(sources)
        return digest([dataclasses.asdict(mixture) | {"sources": sources}, order, self._against(mixture)])

    def _against(self, mixture: schema.Mixture) -> list[str]:
        """Content of the evaluation files that the mixture's rows are held against."""
        return [self._fingerprint(schema.Source(path=path)) for path in mixture.hygiene.against]

    def _source_key(self, source: schema.Source, **changes) -> list:
        """The source's rows by their content, and its settings."""
        rows = self.stages[source.stage].key if source.stage else self._fingerprint(source)
        return [rows, dataclasses.asdict(source) | ({} if source.stage else {"path": None}) | changes]

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
                "data": self._mixture_key(config.data),
                "code": code_version(*CODE["prepare"]),
            }
        )

    def _tokenizer_key(self, name: str) -> str:
        """Key of the checkpoint whose tokenizer `name` passes on: training and merging leave it as it is."""
        while name != "checkpoint" and self.stages[name].plan.base:
            name = self.stages[name].plan.base
        return self._checkpoint_key(name)

    def _evaluation(self, stage: StagePlan, key: str) -> Path | None:
        if stage.config.kind not in schema.MODEL_KINDS:
            return None
        spec = self.recipe.evaluation
        heldout = self._mixture_key(spec.heldout) if spec.heldout else None
        found = digest({"model": key, "spec": spec, "heldout": heldout, "code": code_version(*CODE["evaluate"])})
        return self.root / "evaluations" / f"{stage.name}-{found}.json"


def _keyed(config: schema.Stage, without: tuple[str, ...]) -> dict:
    """The settings that can change a stage's result."""
    fields = [f for f in dataclasses.fields(config) if f.metadata.get("in_key", True) and f.name not in without]
    return {f.name: getattr(config, f.name) for f in fields}
