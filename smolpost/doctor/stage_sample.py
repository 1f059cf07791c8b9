"""A training stage under examination: a sample of its rows, and what training would make of them."""

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from smolpost import schema
from smolpost.chat.render import load_template, render
from smolpost.data import mixtures
from smolpost.data.columns import row_for
from smolpost.data.prepare import prepare, shards_of
from smolpost.data.prompts import mode_of
from smolpost.data.shards import nth, shard_slices
from smolpost.data.sources import read_slice
from smolpost.data.tokenize import TOKENIZERS
from smolpost.data.validate import validate_row
from smolpost.errors import UserError
from smolpost.pipeline.lineage import Lineage, Located
from smolpost.pipeline.steps import input_folders, work_of

#: Layout of rows -> shapes that a row may have (`data.validate`).
SHAPES = {
    "documents": ("messages", "text"),
    "pairs": ("preference",),
    "completions": ("messages",),
    "labelled": ("messages", "preference"),
}
SCANNED = 500  # rows of each source among which the sample is chosen
HEAVY = 1e9  # parameters beyond which a CPU runs the model only for FEW_ROWS or fewer
FEW_ROWS = 4
SHORT_TOKENS = 2048  # of the passes that the model is run on


class NotChecked(Exception):
    """A check that does not apply; the text says why."""


class Case:
    """A stage under examination: its sample, and results that are computed when a check first needs them.

    Args:
        num_rows: Size of the sample.
        folder: For temporary files.
    Attributes:
        failed: Names of the checks that failed so far.
        refused: A line per row that `smolpost prepare` would not take.
        notes: What its ledger would say of how many of the sampled rows (`data.rendering.NOTES`).
        num_scanned: Rows that were read.
        num_taken: Rows that the mixture takes, repeats included.
    """

    def __init__(self, lineage: Lineage, stage: Located, num_rows: int, folder: Path):
        from transformers import AutoTokenizer

        self.lineage, self.stage, self.config = lineage, stage, stage.config
        self.num_rows, self.folder = num_rows, folder
        self.start = input_folders(lineage, stage)[self.config.init_from]
        self.tokenizer = AutoTokenizer.from_pretrained(self.start)
        self.stored_template = self.tokenizer.chat_template
        self.template = load_template(self.config.template)
        self.tokenizer.chat_template = self.template
        self.failed: set[str] = set()
        self.refused: list[str] = []
        self.notes: Counter[str] = Counter()
        self.num_scanned = self.num_taken = 0

    def need(self, what: str, checked_by: str):
        """An attribute whose making another check judges."""
        try:
            return getattr(self, what)
        except NotChecked:
            raise
        except Exception as error:
            raise NotChecked(f"no {what.replace('_', ' ')}, see {checked_by}: {one_line(error)}") from error

    @cached_property
    def sample(self) -> list[dict]:
        """Equally many rows of each mode, from the shortest to the longest."""
        by_mode: dict[str, list] = {}
        for row in self.scanned:
            by_mode.setdefault(mode_of(row), []).append(row)
        if not by_mode:
            raise UserError(f"none of {self.num_scanned} rows is valid; the first: {self.refused[0]}")
        chosen = []
        for i, mode in enumerate(sorted(by_mode)):
            found = sorted(by_mode[mode], key=lambda row: len(json.dumps(row, default=str)))
            share = max(1, (self.num_rows + i) // len(by_mode))
            places = np.unique(np.linspace(0, len(found) - 1, min(share, len(found))).round().astype(int))
            chosen += [found[place] for place in places]
        return chosen

    @cached_property
    def scanned(self) -> list[dict]:
        """The first SCANNED rows that the mixture takes from each source, without refused rows."""
        mixture, valid = self.stage.data[self.config.data], []
        for name, source in mixture.sources.items():
            try:
                for row in islice(self._taken(name, source, mixture.seed), SCANNED):
                    self.num_scanned += 1
                    try:
                        row = row_for(row, source, self.config.layout)
                        self._check_row(row)
                    except UserError as error:
                        self.refused.append(str(error))
                        continue
                    valid.append(row)
            except UserError as error:  # the file breaks off here
                self.refused.append(str(error))
        return valid

    def _taken(self, name: str, source: schema.Source, seed: int) -> Iterator[dict]:
        """The rows of a source that `smolpost prepare` tokenizes."""
        parts = shard_slices(source)
        order = mixtures.choose(source, name, seed, sum(part.num_rows for part in parts))
        self.num_taken += len(order)
        for shard in shards_of(source, parts, np.unique(order), self.folder):
            yield from nth(read_slice(source, shard.part), iter(shard.rows.tolist()))

    def _check_row(self, row) -> None:
        shape = validate_row(row, row.where)
        if shape not in SHAPES[self.config.layout]:
            raise UserError(f"{row.where}: is a {shape} row, and the stage reads {self.config.layout}")
        try:
            for messages in conversations(row):
                self.render(row, messages)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error

    @cached_property
    def trainable(self) -> list[dict]:
        """The sampled rows that `smolpost prepare` can tokenize and mask."""
        tokenize, found = TOKENIZERS[self.config.layout], []
        for row in self.sample:
            [tokens] = tokenize(self.config, [row], self.tokenizer)
            if tokens.fault:
                self.refused.append(tokens.fault)
            else:
                found.append(row)
                self.notes.update(tokens.notes)
        return found

    def render(self, row: dict, messages: list[dict], *, tokenizer=None, **options) -> str:
        """The text of a row's messages as `smolpost prepare` renders them.

        Args:
            tokenizer: In place of the stage's; its chat template is used.
            options: Of `smolpost.chat.render.render`.
        """
        return render(self.tokenizer if tokenizer is None else tokenizer, messages, **self.options(row), **options)

    @cached_property
    def probe(self) -> dict:
        """Rendering options of a made-up conversation: those of the first sampled one, without tools."""
        try:
            row = next((row for row in self.sample if conversations(row)), {})
        except UserError:  # see rows
            row = {}
        return self.options({"chat_template_kwargs": row.get("chat_template_kwargs")})

    def options(self, row: dict) -> dict:
        """Rendering options of a row, as arguments of `render`."""
        return {
            "template_kwargs": row.get("chat_template_kwargs"),
            "tools": row.get("tools"),
            "today": self.config.today,
        }

    def decode(self, ids) -> str:
        """The text of ids, special tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each sampled row; of a pair, those of its longer side."""
        return np.array([max(map(len, ids)) for ids in self.ids])

    @cached_property
    def ids(self) -> list[list[list[int]]]:
        """Ids of each sampled row's conversations or text, tokenized from the rendered text as at inference."""
        found = []
        for row in self.sample:
            texts = [self.render(row, messages) for messages in conversations(row)]
            found.append([self.tokenizer.encode(text, add_special_tokens=False) for text in texts or [row["text"]]])
        return found

    @cached_property
    def prepared_rows(self):
        """The sampled rows as training reads them; their column `rows` counts the sampled rows that fit."""
        from datasets import load_from_disk

        if not self.trainable:
            raise NotChecked(f"none of {len(self.sample)} sampled rows can be tokenized, see rows")
        if not self.fitting:
            raise NotChecked(f"none of {len(self.sample)} sampled rows has at most {self.config.max_seq_len} tokens")
        file, out = self.folder / "sample.jsonl", self.folder / "rows"
        file.write_text("".join(json.dumps(row, default=str) + "\n" for row in self.fitting))
        out.mkdir(exist_ok=True)
        stage = replace(self.config, num_workers=1, max_dropped=1.0)
        source = schema.Source(path=str(file), max_row_bytes=file.stat().st_size)
        mixture = schema.Mixture(sources={"sample": source}, shuffle=False)
        prepare(stage, mixture, self.tokenizer, lambda _: self.folder / "shards", out)
        return load_from_disk(str(out))

    @cached_property
    def fitting(self) -> list[dict]:
        """The sampled rows that the stage uses; `truncate` and `split` use all conversations."""
        if self.config.layout == "documents" and self.config.overlong in ("truncate", "split"):
            return self.trainable
        lengths = zip(self.sample, self.lengths, strict=True)
        short = [row.where for row, length in lengths if length <= self.config.max_seq_len]
        return [row for row in self.trainable if row.where in short]

    @property
    def arrays(self) -> list[dict]:
        rows = self.prepared_rows.with_format("numpy")
        return [rows[i] for i in range(len(rows))]

    @cached_property
    def environment(self):
        from smolpost.training.environment import detect

        return detect(self.config.precision)

    @cached_property
    def model(self):
        """The start checkpoint as training loads it, on the device, without dropout."""
        from smolpost.doctor.training_steps import without_dropout
        from smolpost.training.train import load

        model = load(self.start, self.config, self.lineage.recipe.model.attn_implementation)
        return without_dropout(model.to(self.environment.device))

    @cached_property
    def pair_steps(self):
        """A step on a few pairs whose reference is the model itself."""
        from smolpost.doctor.training_steps import pair_steps

        return pair_steps(
            self.config, self.model_to_run(), self.tokenizer, self.short_pairs, self.environment, self.folder
        )

    @cached_property
    def short_pairs(self):
        """The shortest prepared pairs, at most SHORT_TOKENS together, but at least one."""
        from datasets import Dataset

        from smolpost.training.reference import pair_lengths

        rows = self.need("prepared_rows", "shared prompt and lengths")
        lengths = pair_lengths(rows)
        order = np.argsort(lengths, kind="stable")
        number = max(1, int((np.cumsum(lengths[order]) <= SHORT_TOKENS).sum()))
        # A copy: what reads the Arrow columns themselves does not know of a selection.
        return Dataset.from_list([rows[i] for i in order[:number].tolist()], features=rows.features)

    def short_documents(self) -> list[dict]:
        """The shortest documents of the prepared sample, at most SHORT_TOKENS together, but at least two."""
        from smolpost.doctor.training_steps import short_documents

        self.need("prepared_rows", "mask and lengths")
        found = short_documents(self.arrays, SHORT_TOKENS)
        if len(found) < 2:
            raise NotChecked(f"{len(found)} documents with a trained token; two are needed")
        return found

    def model_to_run(self):
        """The model, if it is `runnable`."""
        return self.runnable(self.need("model", "vocabulary"))

    def runnable(self, model):
        """The model that is given.

        Raises:
            NotChecked: The model is too large for this machine, or an id of the sample has no embedding.
        """
        parameters = sum(p.numel() for p in model.parameters())
        if parameters > HEAVY and self.environment.use_cpu and self.num_rows > FEW_ROWS:
            raise NotChecked(
                f"{parameters:,} parameters on a CPU, above {HEAVY:,.0f}; use a GPU or at most {FEW_ROWS} rows"
            )
        sampled = self.need("ids", "rows")
        highest, size = max(i for row in sampled for ids in row for i in ids), len(model.get_input_embeddings().weight)
        if highest >= size:
            raise NotChecked(f"token id {highest:,} has no embedding among {size:,}, see vocabulary")
        return model


@contextlib.contextmanager
def examined(lineage: Lineage, stage: Located, num_rows: int) -> Iterator[Case]:
    """A training stage as a Case; what is written for it is removed at the end.

    Args:
        stage: One that trains; its start checkpoint is finished.
        num_rows: Size of the sample.
    Raises:
        UserError: The stage does not train, its start or data are missing or cannot be trained, or rows is below 1.
    """
    if stage.prepared is None:
        raise UserError(f"stage={stage.name} of kind {stage.config.kind} trains nothing; doctor checks training stages")
    if num_rows < 1:
        raise UserError(f"rows={num_rows} is below 1; doctor needs a row to look at")
    lineage.require_inputs(stage)
    stage.config.check_start(work_of(lineage, stage, stage.folder))
    with tempfile.TemporaryDirectory(prefix="smolpost-doctor-") as folder:
        yield Case(lineage, stage, num_rows, Path(folder))


def conversations(row: dict) -> list[list[dict]]:
    """The conversations of a row: chosen and rejected, the messages, or none for a text."""
    if "chosen" in row and "rejected" in row:
        return [row["chosen"], row["rejected"]]
    return [row["messages"]] if "messages" in row else []


def one_line(error: Exception) -> str:
    """The text of an error in one line, at most 300 characters; with its type, if it is not the user's."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def difference(expected: str, found: str) -> str:
    """The first place at which two texts differ, and the text there."""
    place = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    place = min(len(expected), len(found)) if place is None else place
    start = max(0, place - 10)
    return f"at character {place} {expected[start : place + 30]!r} against {found[start : place + 30]!r}"
