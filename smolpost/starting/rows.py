"""What a file of rows holds: shape, roles, thinking, lengths and faults, from a sample that is spread over the file."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from smolpost.chat.fates import Fate
from smolpost.chat.reasoning import OPEN
from smolpost.chat.render import text_of
from smolpost.data.columns import row_for
from smolpost.data.rows import Row
from smolpost.data.settings import Rows
from smolpost.data.sources import read_slice, slices
from smolpost.data.tokenize import TOKENIZERS, admitted
from smolpost.data.validate import QUESTION_AND_ANSWER, validate_row
from smolpost.errors import UserError
from smolpost.progress import Progress
from smolpost.registry import ROW_SHAPES
from smolpost.schema import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 2000  # rows that are looked at, of each file
PIECE = 100  # neighbouring rows of the sample, so that it is spread over the file
PROBED = 50  # rows by which the columns are told
BATCH = 100  # rows that are tokenized at a time
HELD_OUT_SHARE, MOST_HELD_OUT = 0.05, 200  # rows at a file's end that do not train
FEWEST_ROWS = 400  # of a file from which rows are held out
FLAGS = {"documents": "--sft", "pairs": "--preference"}
WHAT = {"messages": "conversations", "text": "plain text", "preference": "preference pairs"}


@dataclass
class File:
    """A file of rows.

    Attributes:
        name: Of the source in the recipe.
        source: Its path, with columns and names as they were told.
        layout: documents or pairs.
        num_rows: Of the whole file.
        sample: Rows as they are in the file.
        tail: Its last rows, the ones to hold out, as they are in the file.
        rows: The sample in our columns; refused rows have a fault.
        kinds: Shape of a row, as `validate_row` has it -> rows of the sample.
        roles: Role -> turns of the sample.
    """

    name: str
    source: Source
    layout: str
    num_rows: int
    sample: list[Row]
    tail: list[Row]
    rows: list[Row] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)
    roles: Counter = field(default_factory=Counter)

    @property
    def flag(self) -> str:
        return f"{FLAGS[self.layout]} {self.source.path}"

    @property
    def good(self) -> list[Row]:
        return [row for row in self.rows if row.fault is None]

    def admit(self, rows: list[Row]) -> list[Row]:
        """Rows of the file in our columns, as the source says."""
        return [admitted(row, self.source, self.layout) for row in rows]

    def needs(self) -> str | None:
        """What in the rows needs a template with modes or tools."""
        if any(row.get("tools") or _calls(row) for row in self.good):
            return "tools"
        return "reasoning" if any(map(_thinks, self.good)) else None


@dataclass
class Tokens:
    """The sample under the checkpoint's tokenizer and the pipeline's template, row by row; refused rows are left out.

    Attributes:
        lengths: [N] tokens that a row needs: of a pair, its prompt with its longer side.
        total: [N] all tokens of the row: of a pair, its prompt and both sides.
        trained: [N] tokens that train.
        sides: [N, 2] tokens of chosen and rejected; of documents, zeros.
        thinks: [N] whether reasoning trains.
        notes: What the rendering makes of rows (`data.rendering.NOTES`) -> rows.
        faults: Why rows are refused, each with its place.
        held_out: Rows at the file's end for the evaluation.
    """

    lengths: np.ndarray
    total: np.ndarray
    trained: np.ndarray
    sides: np.ndarray
    thinks: np.ndarray
    notes: Counter
    faults: list[str]
    held_out: int = 0


def look(path: str, layout: str, name: str, roles: dict[str, str] | None = None) -> File:
    """Read the sample and tell the columns.

    Args:
        name: Of the source in the recipe.
        roles: Role of the file -> system, user, assistant or tool.
    Raises:
        UserError: There is no such file, it has no rows, or no row of the sample is of the layout.
    """
    source = Source(path=path, roles=roles or {})
    try:
        parts = slices(source, PIECE)
        sample = list(_sampled(source, parts))
        num_rows = sum(part.num_rows for part in parts)
        tail = _tail(path, num_rows)
    except UserError as error:
        raise UserError(f"{FLAGS[layout]} {error}") from None
    source = _told(source, sample, layout)
    file = File(name, source, layout, num_rows, sample, tail)
    file.rows = file.admit(sample)
    for i, row in enumerate(file.rows):
        try:
            file.kinds[_kind(row, layout)] += 1
        except UserError as error:
            file.rows[i] = Row({}, row.path, row.number, fault=str(error))
    _check_kind(file)
    for row in file.good:
        turns = row.get("chosen") or row.get("messages") or ()
        file.roles.update(turn["role"] for turn in turns)
    return file


def _sampled(source: Source, parts: list) -> Iterator[Row]:
    num = -(-SAMPLE // PIECE)
    chosen = parts if len(parts) <= num else [parts[i] for i in np.linspace(0, len(parts) - 1, num).astype(int)]
    left = SAMPLE
    for part in chosen:  # a compressed file is one part
        for row in islice(read_slice(source, part), left):
            left -= 1
            yield row


def _tail(path: str, num_rows: int) -> list[Row]:
    if num_rows < FEWEST_ROWS:
        return []
    source = Source(path=path, first_row=num_rows - min(MOST_HELD_OUT, int(num_rows * HELD_OUT_SHARE)))
    return [row for part in slices(source, SAMPLE) for row in read_slice(source, part)]


def _told(source: Source, sample: list[Row], layout: str) -> Source:
    """The source with the columns, and names of columns, by which the fewest rows are refused."""
    probed = sample[:: max(1, len(sample) // PROBED)]
    renames = [dict(zip(pair, ("instruction", "output"), strict=True)) for pair in QUESTION_AND_ANSWER]
    candidates = [replace(source, columns=name) for name in ROW_SHAPES]
    candidates += [replace(source, columns="alpaca", rename=names) for names in renames]

    def badness(candidate: Source) -> tuple[int, int, int]:
        kinds, hinted = Counter(), 0
        for row in probed:
            try:
                kinds[_kind(row_for(row, candidate, layout), layout)] += 1
            except UserError as error:
                kinds["refused"] += 1
                hinted += "set columns: " in str(error) or "columns=" in str(error)  # it is of another shape
        return kinds["refused"], kinds["text"], hinted  # a text beside a conversation is a rendering of it

    told = min(candidates, key=badness)
    if badness(told)[0] > len(probed) / 2:
        repaired = replace(told, last_user_is_reply=True)
        return min(told, repaired, key=badness)
    return told


def _kind(row: Row, layout: str) -> str:
    if row.fault:
        raise UserError(row.fault)
    return validate_row(row, row.where, pairs=layout == "pairs")


def _check_kind(file: File) -> None:
    """Refuse a file without a usable row, or one that belongs to the other flag."""
    if not file.kinds:
        first = next(row.fault for row in file.rows if row.fault)
        here = "; for smolpost new: --roles NAME=ROLE" if "the source's roles" in first else ""
        raise UserError(
            f"{FLAGS[file.layout]}: none of the {len(file.rows):,} rows looked at can be used; {first}{here}"
        )
    wanted = ("preference",) if file.layout == "pairs" else ("messages", "text")
    found = max(file.kinds, key=file.kinds.__getitem__)
    if found not in wanted:
        other = FLAGS["documents" if file.layout == "pairs" else "pairs"]
        expected = "pairs of chosen and rejected" if file.layout == "pairs" else "conversations or texts"
        raise UserError(
            f"{file.flag}: its rows are {WHAT[found]}, and {FLAGS[file.layout]} takes {expected}; give the file as "
            f"{other}"
        )


def _calls(row: Row) -> bool:
    return any(turn.get("tool_calls") for turn in row.get("messages") or row.get("chosen") or ())


def _thinks(row: Row) -> bool:
    turns = [turn for key in ("messages", "chosen", "rejected") for turn in row.get(key) or ()]
    return any(turn.get("reasoning_content") or OPEN in text_of(turn.get("content")) for turn in turns)


# ---------------------------------------------------------------- by the tokenizer


def tokenize(file: File, stage: Rows, tokenizer: "PreTrainedTokenizerBase", context: int | None) -> Tokens:
    """Tokenize the sample as training does, and choose the rows to hold out.

    Rows that do not state their mode, and would be made to think without a think block, get a setting of the source:
    `enable_thinking: false` if no row thinks, else `mode_from_reply`.

    Args:
        stage: A stage that reads the file.
        tokenizer: With the stage's chat template.
        context: The longest of the model, in tokens.
    Raises:
        UserError: No row of the sample can be trained on.
    """
    found = _tokenized(file, file.rows, stage, tokenizer)
    if found.notes["mode"]:
        mode = {"mode_from_reply": True} if found.thinks.any() else {"enable_thinking": False}
        file.source = replace(file.source, **mode)
        file.rows = file.admit(file.sample)
        found = _tokenized(file, file.rows, stage, tokenizer)
    if not len(found.lengths):
        raise UserError(f"{file.flag}: none of the {len(file.rows):,} rows looked at can train; {found.faults[0]}")
    if not found.trained.any():
        raise UserError(f"{file.flag}: no token of the {len(file.rows):,} rows looked at trains; it needs replies")
    if file.tail:
        # One bad row would stop the evaluation after the training.
        tail = _tokenized(file, file.admit(file.tail), stage, tokenizer)
        if not tail.faults and tail.trained.all() and tail.lengths.max() <= (context or np.inf):
            found.held_out = len(file.tail)
    return found


def _tokenized(file: File, rows: list[Row], stage: Rows, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    found = []
    with Progress(f"tokenize a sample of {file.source.path}", len(rows), "row", aside=True) as progress:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            found += TOKENIZERS[file.layout](stage, batch, tokenizer)
            progress.update(len(batch))
    good = [row for row in found if row.fault is None]
    sizes = [[len(part) for part in row.ids] for row in good]
    return Tokens(
        lengths=np.array([size[0] + max(size[1:], default=0) for size in sizes], int),
        total=np.array([sum(size) for size in sizes], int),
        trained=np.array([sum(int((part == Fate.TRAINED).sum()) for part in row.fates) for row in good], int),
        sides=np.array([size[1:] or [0, 0] for size in sizes], int).reshape(-1, 2),
        thinks=np.array([row.thinks for row in good], bool),
        notes=Counter(note for row in good for note in row.notes),
        faults=[row.fault for row in found if row.fault is not None],
    )


def source_names(paths: list[str]) -> list[str]:
    """A different name for each file: its own name without its suffixes, in the letters that a recipe's names have."""
    names: list[str] = []
    for path in paths:
        stem = re.sub(r"(\.(jsonl|json|parquet|gz|zst))+$", "", path.rstrip("/").rpartition("/")[2])
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-") or "rows"
        while name in names:
            name += "_"
        names.append(name)
    return names
