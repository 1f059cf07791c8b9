"""What the stages share that train: prepared rows, a start checkpoint, ranks, checkpoints to resume from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from smolpost.data.settings import PREPARE_VERSION, TOKENIZE_VERSION
from smolpost.errors import UserError, Wrong
from smolpost.files import MANIFEST, read_json
from smolpost.schema import ADDED_TOKENS, Architecture, Recipe
from smolpost.stages.base import CHECKPOINT, Stage, Work
from smolpost.training import trackers
from smolpost.training.batch_size import check_global_batch
from smolpost.training.memory import memory, setup_of, shape_of, shown
from smolpost.training.settings import or_our_engine

SMOLLM3_3B, SMOLLM3_VOCABULARY = "HuggingFaceTB/SmolLM3-3B", 128256  # whose other sizes are Architecture's defaults
RENDERING = ("layout", "today", "train_roles", "train_reasoning", "last_turn_only")


def _start_config(recipe: Recipe) -> dict[str, Any]:
    """The config.json of the model that the pipeline starts from, without asking the Hub; {} where it is not known."""
    model = recipe.model
    if model.checkpoint is None:
        words = [stage.vocab_size for stage in recipe.stages.values() if hasattr(stage, "vocab_size")]
        return dataclasses.asdict(model.architecture) | {"model_type": "smollm3", "vocab_size": max(words, default=0)}
    file = Path(model.checkpoint) / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model.checkpoint, file.name, revision=model.revision)
        except HFValidationError:  # a folder that is not there yet
            return {}
        if not isinstance(cached, str):
            known = {"model_type": "smollm3", "vocab_size": SMOLLM3_VOCABULARY}
            return dataclasses.asdict(Architecture()) | known if model.checkpoint.startswith(SMOLLM3_3B) else {}
        file = Path(cached)
    config = read_json(file)
    return config.get("text_config", config)


class TrainStage(Stage):
    """A kind that trains. Beside it a subclass has the fields of a `training.settings.Training`.

    Attributes:
        ROWS: The class of `data.settings` whose fields decide the prepared rows.
    """

    MAKES_MODEL: ClassVar[bool] = True
    RESUMABLE: ClassVar[bool] = True
    LAUNCHED: ClassVar[bool] = True
    ROWS: ClassVar[type]

    # ------------------------------------------------------------ inputs

    def parents(self):
        return [("init_from", self.init_from)]

    def mixtures(self):
        return [("data", self.data)]

    def seeds_to_run(self):
        return self.seeds

    def base_input(self, stages):
        return self.init_from

    def template_of(self, stages):
        return self.template

    # ------------------------------------------------------------ checks

    def check(self, key, recipe, place):
        trackers.check_names(key, self.report_to)
        if self.engine == "smolpost" and self.trl != type(self.trl)():
            raise Wrong(f"{key}.trl", f" is read under {key}.engine=trl alone; set that, or leave it out")
        if self.engine == "trl" and self.data in recipe.data:
            for source, spec in recipe.data[self.data].sources.items():
                if spec.loss_weight != 1:
                    raise Wrong(
                        f"data.{self.data}.sources.{source}.loss_weight",
                        f"={spec.loss_weight:g} weighs losses, and TRL's are all alike; leave it out"
                        f"{or_our_engine(self, key)}",
                    )
        if self.lora.r and self.snapshot_steps:
            raise Wrong(
                f"{key}.snapshot_steps",
                f"={self.snapshot_steps} keeps whole weights, and {key}.lora.r={self.lora.r} trains adapters; set one "
                "of them to null or 0",
            )

    def check_installed(self, entry):
        trackers.check_installed(f"stages.{entry}", self.report_to)

    def check_plan(self, entry, recipe):
        """Refuse more ranks than rows, and another template than the start's.

        A base checkpoint's own template is known when its rows are prepared.
        """
        from smolpost.chat.render import load_template

        check_global_batch(entry, self.global_batch_size, recipe.accelerate.get("num_processes", 1))
        stages = recipe.stages
        spoken = stages[self.init_from].template_of(stages) if self.init_from in stages else None
        if spoken is None or self.allow_template_change or load_template(spoken) == load_template(self.template):
            return
        raise UserError(
            f"stages.{entry}.template={self.template}, but {self.init_from} was trained with {spoken}; "
            f"set the same one, or stages.{entry}.allow_template_change=true where the change is meant"
        )

    def notes(self, recipe):
        launch = recipe.accelerate
        kind, ranks = launch.get("distributed_type"), launch.get("num_processes", 1)
        zero = launch.get("deepspeed_config", {}).get("zero_stage", 2)
        backend = {"DEEPSPEED": f"zero{zero}", "FSDP": "fsdp2"}.get(kind, "ddp" if ranks > 1 else "single")
        setup = setup_of(self, bf16=self.precision != "fp32", backend=backend, ranks=ranks)
        if setup is None:
            return []
        shape = shape_of(_start_config(recipe), compiled=True)
        needed = shown(memory(shape, setup), setup) if shape else ["memory: not known, as the model's sizes are not"]
        return [*needed, *self._untrained_rows(recipe)]

    def _untrained_rows(self, recipe: Recipe) -> list[str]:
        """A line where adapters start from a checkpoint with new tokens, whose rows they do not train."""
        if not self.lora.r or self.init_from != CHECKPOINT or recipe.model.checkpoint is None:
            return []
        made = read_json(Path(recipe.model.checkpoint) / MANIFEST)
        if made.get("kind") != ADDED_TOKENS:
            return []
        number = len(made["report"]["tokens"])
        return [
            f"LoRA does not train the rows of the {number} tokens that {recipe.model.checkpoint} got from add-tokens: "
            "they stay the mean of the old rows; train a stage with lora.r=0 first"
        ]

    # ------------------------------------------------------------ keys

    def rows_fields(self) -> dict[str, Any]:
        """The fields that decide the prepared rows, without those that the key has by content."""
        fields = [f for f in dataclasses.fields(self.ROWS) if f.metadata.get("in_key", True)]
        return {f.name: getattr(self, f.name) for f in fields if f.name not in ("data", "template")}

    def keyed_fields(self):
        without = [*self.rows_fields(), "data", "template", "seeds", "init_from"]
        # What a stage does not use is left out, so that stages from before these fields are still done.
        if self.engine == "smolpost":
            without += ["engine", "trl"]
        if self.warmup_steps is None:
            without.append("warmup_steps")
        return {name: value for name, value in super().keyed_fields().items() if name not in without}

    def prepared_parts(self, keys):
        from smolpost.chat.render import load_template

        return {
            "layout": self.layout,
            "tokenizer": keys.tokenizer(self.init_from),
            "settings": self.rows_fields(),
            "template": load_template(self.template),
            "data": keys.mixture(keys.recipe.data[self.data]),
            "version": [TOKENIZE_VERSION, PREPARE_VERSION],
        }

    def tokenized_parts(self, source: list, hygiene: list, tokenizer: str) -> dict[str, Any]:
        """What the tokenized rows of a source hang on; all stages that read and render it in the same way share them.

        Args:
            source: Its rows by content and its settings, without SELECTING.
            hygiene: The mixture's settings, and content of the evaluation files that rows are compared with.
            tokenizer: All that decides how it renders and tokenizes.
        """
        return {
            "source": source,
            "rendering": {name: getattr(self, name) for name in RENDERING},
            "hygiene": hygiene,
            "tokenizer": tokenizer,
            "version": TOKENIZE_VERSION,
        }

    # ------------------------------------------------------------ work

    def check_start(self, work: Work) -> None:
        """Refuse a start checkpoint that cannot be trained, before rows are prepared.

        Raises:
            UserError: With the remedy.
        """
        from smolpost.training.start import check_start

        self.check_installed(work.stage.entry)
        stage, attention = work.stage, work.recipe.model.attn_implementation
        check_start(stage.entry, self, work.inputs[self.init_from], attention)

    def tokenizer_for(self, work: Work):
        """The start's tokenizer with the stage's chat template.

        Raises:
            UserError: A checkpoint from elsewhere speaks another template, and the stage does not allow the change; or
                the tokenizer lacks control tokens of the template.
        """
        from transformers import AutoTokenizer

        from smolpost.chat.needed_tokens import check_tokens
        from smolpost.chat.render import load_template, template_hash

        tokenizer, template = AutoTokenizer.from_pretrained(work.inputs[self.init_from]), load_template(self.template)
        elsewhere = self.init_from == CHECKPOINT or work.recipe.stages[self.init_from].checkpoints()
        found = tokenizer.chat_template if elsewhere else None
        if isinstance(found, str) and found != template and not self.allow_template_change:
            entry = work.stage.entry
            start = "model.checkpoint" if self.init_from == CHECKPOINT else self.init_from
            raise UserError(
                f"stages.{entry}.template={self.template} (hash {template_hash(template)}) is not the chat template "
                f"of {start} (hash {template_hash(found)}); set a .jinja file with that one, or "
                f"stages.{entry}.allow_template_change=true where the change is meant"
            )
        if not self.allow_split_tokens:
            start = work.recipe.model.checkpoint or work.inputs[self.init_from]
            check_tokens(tokenizer, self.template, f"stages.{work.stage.entry}", start)
        tokenizer.chat_template = template
        return tokenizer

    def prepare(self, work: Work, tokenizer, shards: Callable[[str], Path]) -> dict:
        """Write the prepared rows into `work.folder`; the ledger.

        Args:
            tokenizer: Of `tokenizer_for`.
            shards: Source's name -> folder of its tokenized rows.
        Raises:
            RefusedRows: Too many rows are refused.
        """
        from smolpost.data.prepare import prepare

        return prepare(self, work.data[self.data], tokenizer, shards, work.folder)

    def make(self, work: Work):
        self.check_installed(work.stage.entry)
        with trackers.environment(self.report_to, work.folder):  # which TRL's imports read, too
            return self._train(work)

    def _train(self, work: Work) -> dict[str, Any]:
        from smolpost.model.stored import one_line
        from smolpost.training.environment import detect
        from smolpost.training.train import train

        try:
            method = self.method()
        except ImportError as error:
            raise UserError(
                f"stages.{work.stage.entry}.engine={self.engine} cannot be loaded ({one_line(error)}); install what "
                "constraints.txt names"
            ) from error
        return train(
            work.stage.entry,
            self,
            method,
            seed=work.stage.seed,
            start=work.inputs[self.init_from],
            prepared=work.prepared,
            out=work.folder,
            references=work.root / "references",
            attn_implementation=work.recipe.model.attn_implementation,
            environment=detect(self.precision),
            teacher=self.teacher_of(work),
        )

    def teacher_of(self, work: Work) -> Path | None:
        """Folder of the checkpoint beside which the stage trains, where that is not its start."""
        return None

    def method(self):
        """The `training.train.Method` that trains on the stage's rows, a module that imports torch."""
        raise NotImplementedError

    def tidy(self, folder):
        from smolpost.training.checkpoints import remove_all

        remove_all(folder)
