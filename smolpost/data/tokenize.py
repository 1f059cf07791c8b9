"""Rows to Arrow batches of token ids with the fate of each token, and what there is to know of each row."""

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa

from smolpost.chat.fates import Fate
from smolpost.chat.masks import Encoded, check_spans, encode, encode_batch, encode_pair
from smolpost.chat.reasoning import OPEN
from smolpost.chat.render import has_foreign_tags
from smolpost.chat.shown import Modes
from smolpost.data.collate import PARTS
from smolpost.data.columns import row_for
from smolpost.data.prompts import mode_of
from smolpost.data.rendering import fault_of, notes_of, trained_modes
from smolpost.data.rows import Row
from smolpost.data.settings import DocumentRows, Rows
from smolpost.data.tokenize_completions import tokenize_completions
from smolpost.data.tokenized import Tokenized, policy_of, refused
from smolpost.data.validate import validate_row
from smolpost.errors import UserError
from smolpost.schema import Source

BATCH_ROWS = 256  # of one tokenizer call, at most
BATCH_CHARACTERS = 2**22  # of one tokenizer call, about: bounds the memory of a batch of long rows
ENDS_OF_TEXT = ("<|end_of_text|>", "<|endoftext|>")  # a tokenizer has one of them, besides its end of a turn

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("number", pa.int64()),  # row of path, from 1
        ("ids", pa.list_(pa.int32())),  # of the document, or of all parts, one after another
        ("fates", pa.list_(pa.int8())),
        # Tokens of each part: the document; or prompt, chosen and rejected; or prompt and completion, where rows have
        # labels first the desired ones, then the undesired ones.
        ("parts", pa.list_(pa.int32())),
        ("fate_counts", pa.list_(pa.int64(), len(Fate))),
        ("is_text", pa.bool_()),  # plain text, not a conversation
        ("think", pa.bool_()),  # reasoning trains; of a pair, on its chosen side
        ("unknown", pa.int64()),  # tokens for characters that the tokenizer does not know
        ("neutralised", pa.int64()),  # control tokens in the row's own text, which became plain text
        ("content", pa.uint64()),  # hash of ids and parts
        ("features", pa.binary()),  # what hygiene compares, or null
        ("fault", pa.string()),  # why the row is refused (it then has no tokens), or null
        ("unread", pa.list_(pa.string())),  # its keys that are not read
        ("notes", pa.list_(pa.string())),  # what its rendering makes of it, of `rendering.NOTES`
    ]
)


def token_batches(
    stage: Rows, rows: Iterable[Row], tokenizer, features: Callable[[dict], bytes] | None = None
) -> Iterator[pa.RecordBatch]:
    """Batches of SCHEMA, a line per row, in order; a row that is refused says why in its line.

    Args:
        rows: As `admitted` gives them.
        tokenizer: Its chat template is the stage's.
        features: Row -> what hygiene compares rows by.
    Raises:
        UserError: As `check_tags`.
    """
    tokenize = TOKENIZERS[stage.layout]
    checked: set = set()
    for batch in _batched(rows):
        tokenized = tokenize(stage, batch, tokenizer)
        good = [row for row, found in zip(batch, tokenized, strict=True) if found.fault is None]
        check_tags(stage, good, tokenizer, checked)
        yield _record_batch(batch, tokenized, tokenizer, features)


def check_tags(stage: Rows, rows: Iterable[Row], tokenizer, checked: set) -> None:
    """Refuse a template whose {% generation %} tags mark other things than replies.

    Rendering every row several times would take long, so the first one of each shape is asked.

    Args:
        checked: Shapes that were asked; the new ones are added.
    Raises:
        UserError: Names the row, and what the tags mark.
    """
    if "all" in stage.train_roles or not has_foreign_tags(tokenizer):
        return
    for row in rows:
        sides = ("chosen", "rejected") if "chosen" in row and "rejected" in row else ("messages",)
        for messages in filter(None, map(row.get, sides)):
            if (shape := _shape_of(row, messages)) in checked:
                continue
            checked.add(shape)
            options = {"template_kwargs": row.get("chat_template_kwargs"), "tools": row.get("tools")}
            try:
                check_spans(tokenizer, messages, **options, today=stage.today)
            except UserError as error:
                raise UserError(f"{row.where}: {error}") from error


def _shape_of(row: Row, messages: list[dict]) -> tuple:
    """What decides which branches of a template a conversation goes through."""
    keys = frozenset((message["role"], key) for message in messages for key, value in message.items() if value)
    return keys, mode_of(row), bool(row.get("tools")), len(messages) > 3, OPEN in str(messages[-1].get("content"))


def admitted(row: Row, source: Source, layout: str) -> Row:
    """`row_for`, or the row with its fault."""
    try:
        return row_for(row, source, layout)
    except UserError as error:
        return Row({}, row.path, row.number, fault=str(error))


def _batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += _num_characters(row)
        if len(batch) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _num_characters(value) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0


def _record_batch(rows: list[Row], tokenized: list[Tokenized], tokenizer, features) -> pa.RecordBatch:
    ids = [np.concatenate(row.ids) for row in tokenized]
    fates = [np.concatenate(row.fates) for row in tokenized]
    for row_fates in fates:
        row_fates[:1] = Fate.FIRST
    parts = [np.array([len(part) for part in row.ids], np.int32) for row in tokenized]
    columns = {
        "path": [row.path for row in rows],
        "number": [row.number for row in rows],
        "ids": lists(ids, np.int32),
        "fates": lists(fates, np.int8),
        "parts": lists(parts, np.int32),
        "fate_counts": [np.bincount(row_fates, minlength=len(Fate)) for row_fates in fates],
        "is_text": [row.is_text for row in tokenized],
        "think": [row.thinks for row in tokenized],
        "unknown": [int((row_ids == tokenizer.unk_token_id).sum()) for row_ids in ids],
        "neutralised": [row.neutralised for row in tokenized],
        "content": [_content_hash(*pair) for pair in zip(ids, parts, strict=True)],
        "features": [
            features(row) if features and row_tokens.fault is None else None
            for row, row_tokens in zip(rows, tokenized, strict=True)
        ],
        "fault": [row.fault for row in tokenized],
        "unread": [row.unread for row in rows],
        "notes": [row.notes for row in tokenized],
    }
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, SCHEMA.field(name).type)
        for name, column in columns.items()
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def lists(arrays: list[np.ndarray], dtype) -> pa.ListArray:
    """An Arrow column of lists from arrays."""
    offsets = np.concatenate(([0], np.cumsum([len(array) for array in arrays]))).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(arrays).astype(dtype, copy=False))


def _content_hash(ids: np.ndarray, parts: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes() + parts.tobytes(), digest_size=8).digest(), "little")


# ---------------------------------------------------------------- conversations and texts


def tokenize_rows(stage: DocumentRows, rows: list[Row], tokenizer) -> list[Tokenized]:
    """Conversations and texts in one tokenizer call each."""
    shapes, faults = [], []
    for row in rows:
        shape, fault = None, row.fault
        if fault is None:
            try:
                shape = _sft_shape(row)
            except UserError as error:
                fault = str(error)
        shapes.append(shape)
        faults.append(fault)
    chats = _encode_chats(stage, [row for row, s in zip(rows, shapes, strict=True) if s == "messages"], tokenizer)
    texts = encode_texts([row["text"] for row, s in zip(rows, shapes, strict=True) if s == "text"], tokenizer)
    encoded = {"messages": iter(chats), "text": iter(texts)}
    tokenized = []
    modes = trained_modes(tokenizer, stage)
    for row, shape, fault in zip(rows, shapes, faults, strict=True):
        found = next(encoded[shape]) if shape else fault
        if isinstance(found, str):
            tokenized.append(refused(found, 1))
            continue
        ids, fates = np.array(found.input_ids, np.int32), np.array(found.fates, np.int8)
        notes = notes_of(row, found, modes) if shape == "messages" else ()
        tokenized.append(Tokenized([ids], [fates], found.neutralised, found.thinks, shape == "text", notes=notes))
    return tokenized


def _sft_shape(row: Row) -> str:
    shape = validate_row(row, row.where)
    if shape == "preference":
        raise UserError(
            f"{row.where}: is a preference row, and the stage trains on documents; expected messages or text; "
            "take the source out of the mixture"
        )
    return shape


def _encode_chats(stage: DocumentRows, rows: list[Row], tokenizer) -> list[Encoded | str]:
    """Each row's tokens, or why it is refused."""
    options = {"today": stage.today, "policy": policy_of(stage)}
    kwargs = [row.get("chat_template_kwargs") for row in rows]
    tools = [row.get("tools") for row in rows]
    messages = [row["messages"] for row in rows]
    encoded: list[Encoded | str] = []
    try:
        encoded += encode_batch(tokenizer, messages, template_kwargs=kwargs, tools=tools, **options)
    except UserError:  # one by one, to tell which rows are refused
        for row, turns, variables, functions in zip(rows, messages, kwargs, tools, strict=True):
            try:
                encoded.append(encode(tokenizer, turns, template_kwargs=variables, tools=functions, **options))
            except UserError as error:
                encoded.append(f"{row.where}: {error}")
    return [
        found if isinstance(found, str) else fault_of(row, found.lost) or found
        for row, found in zip(rows, encoded, strict=True)
    ]


def encode_texts(texts: list[str], tokenizer) -> list[Encoded]:
    """The text's tokens and the token that ends it, all trained."""
    if not texts:
        return []
    unknown = (None, tokenizer.unk_token_id)
    ends = [i for i in map(tokenizer.convert_tokens_to_ids, ENDS_OF_TEXT) if i not in unknown]
    end = ends[0] if ends else tokenizer.eos_token_id
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return [
        Encoded([*ids, end], [Fate.TRAINED] * (len(ids) + 1), 0) for ids in tokenizer(texts, **options)["input_ids"]
    ]


# ---------------------------------------------------------------- pairs


def tokenize_pairs(stage: Rows, rows: list[Row], tokenizer) -> list[Tokenized]:
    """Tokenize preference pairs; a refused pair has its reason."""
    tokenized, modes = [], trained_modes(tokenizer, stage)
    for row in rows:
        try:
            if row.fault:
                raise UserError(row.fault)
            tokenized.append(_tokenize_pair(stage, row, tokenizer, modes))
        except UserError as error:
            tokenized.append(refused(str(error), len(PARTS)))
    return tokenized


def _tokenize_pair(stage: Rows, row: Row, tokenizer, modes: Modes | None) -> Tokenized:
    """Prompt, chosen and rejected; what both sides begin with is part of the prompt.

    Args:
        modes: As `notes_of`.
    Raises:
        UserError: The row is refused.
    """
    if validate_row(row, row.where) != "preference":
        raise UserError(
            f"{row.where}: has the columns {', '.join(row)}, and the stage trains on pairs; expected chosen and "
            "rejected; take the source out of the mixture"
        )
    try:
        pair = encode_pair(
            tokenizer,
            row["chosen"],
            row["rejected"],
            template_kwargs=row.get("chat_template_kwargs"),
            tools=row.get("tools"),
            today=stage.today,
            policy=policy_of(stage),
        )
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    if fault := fault_of(row, pair.lost):
        raise UserError(fault)
    ids = [np.array(part, np.int32) for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    fates = [np.array(part, np.int8) for part in (pair.prompt_fates, pair.chosen_fates, pair.rejected_fates)]
    shared = num_shared(ids[1:], fates[1:])
    return Tokenized(
        [np.concatenate((ids[0], ids[1][:shared])), ids[1][shared:], ids[2][shared:]],
        [np.concatenate((fates[0], fates[1][:shared])), fates[1][shared:], fates[2][shared:]],
        pair.neutralised,
        pair.thinks,
        notes=notes_of(row, pair, modes),
    )


def num_shared(ids: list[np.ndarray], fates: list[np.ndarray]) -> int:
    """Number of tokens with which both completions begin, with equal scoring; at least one token of each is left."""
    length = max(0, min(map(len, ids)) - 1)
    scored = [side[:length] == Fate.TRAINED for side in fates]
    differs = (ids[0][:length] != ids[1][:length]) | (scored[0] != scored[1])
    return int(differs.argmax()) if differs.any() else length


#: Layout of rows -> what tokenizes them.
TOKENIZERS = {
    "documents": tokenize_rows,
    "pairs": tokenize_pairs,
    "completions": tokenize_completions,
    "labelled": tokenize_completions,
}
