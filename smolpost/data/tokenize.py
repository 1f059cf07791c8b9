"""Rows to token ids and the mask of the policy's tokens, as flat arrays.

N rows, T tokens of all rows one after another.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
from tqdm import tqdm

from smolpost.chat.masks import encode, encode_batch, encode_pair
from smolpost.data.sources import validate_row
from smolpost.errors import UserError
from smolpost.schema import APOStage, SFTStage

BATCH_ROWS = 256  # of one tokenizer call
END_OF_TEXT = "<|end_of_text|>"

Rows = list[tuple[str, dict]]  # (source name, row)

PAIR_TYPES = {
    "prompt_ids": "int32",
    "chosen_ids": "int32",
    "rejected_ids": "int32",
    "prompt_mask": "int8",
    "chosen_mask": "int8",
    "rejected_mask": "int8",
}


@dataclass
class Tokens:
    """All rows, tokenized.

    Attributes:
        ids: [T] int32.
        trained: [T] bool, False on the first token of each row.
        offsets: [N + 1] row i is ids[offsets[i]:offsets[i + 1]].
        is_text: [N] bool: plain text, not a conversation.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    is_text: np.ndarray


def tokenize_rows(stage: SFTStage, rows: Rows, tokenizer) -> Tokens:
    ids, trained, lengths, is_text = [], [], [], []
    with tqdm(total=len(rows), desc=f"prepare {stage.data}", unit="row", disable=None) as bar:
        for first in range(0, len(rows), BATCH_ROWS):
            batch = list(enumerate(rows[first : first + BATCH_ROWS], start=first))
            shapes = [sft_shape(i, name, row) for i, (name, row) in batch]
            encoded = encode_rows(stage, batch, shapes, tokenizer)
            ids.append(np.fromiter(chain.from_iterable(row_ids for row_ids, _ in encoded), np.int32))
            trained.append(np.fromiter(chain.from_iterable(row_trained for _, row_trained in encoded), bool))
            lengths += [len(row_ids) for row_ids, _ in encoded]
            is_text += [shape == "text" for shape in shapes]
            bar.update(len(batch))
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    tokens = Tokens(np.concatenate(ids), np.concatenate(trained), offsets, np.array(is_text))
    if stage.loss_on == "all":
        tokens.trained[:] = True
    tokens.trained[offsets[:-1]] = False
    return tokens


def sft_shape(i: int, name: str, row: dict) -> str:
    shape = validate_row(row, where_of(i, row))
    if shape == "preference":
        raise UserError(
            f"{where_of(i, row)} (source {name}): is a preference row in an sft stage; "
            "expected messages or text; take the source out of the mixture"
        )
    return shape


def encode_rows(stage: SFTStage, batch, shapes: list[str], tokenizer) -> list[tuple[list[int], list[bool]]]:
    """(ids, trained) of each row, conversations and texts in one tokenizer call each."""
    chats = [(i, row) for (i, (_, row)), shape in zip(batch, shapes, strict=True) if shape == "messages"]
    texts = [row["text"] for (_, (_, row)), shape in zip(batch, shapes, strict=True) if shape == "text"]
    encoded = {"messages": iter(encode_chats(stage, chats, tokenizer)), "text": iter(encode_texts(texts, tokenizer))}
    return [next(encoded[shape]) for shape in shapes]


def encode_chats(stage: SFTStage, chats: list[tuple[int, dict]], tokenizer):
    options = {"today": stage.today, "last_turn_only": stage.last_turn_only}
    kwargs = [row.get("chat_template_kwargs") for _, row in chats]
    tools = [row.get("tools") for _, row in chats]
    messages = [row["messages"] for _, row in chats]
    try:
        return encode_batch(tokenizer, messages, template_kwargs=kwargs, tools=tools, **options)
    except UserError:
        for (i, row), turns, variables, functions in zip(chats, messages, kwargs, tools, strict=True):
            try:  # one by one, to name the row
                encode(tokenizer, turns, template_kwargs=variables, tools=functions, **options)
            except UserError as error:
                raise UserError(f"{where_of(i, row)}: {error}") from error
        raise


def encode_texts(texts: list[str], tokenizer):
    """The text's tokens and the token that ends it, all trained."""
    if not texts:
        return []
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    if end is None or end == tokenizer.unk_token_id:
        end = tokenizer.eos_token_id
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return [([*ids, end], [True] * (len(ids) + 1)) for ids in tokenizer(texts, **options)["input_ids"]]


def tokenize_pair(stage: APOStage, i: int, name: str, row: dict, tokenizer) -> dict[str, np.ndarray]:
    where = where_of(i, row)
    if validate_row(row, where) != "preference":
        raise UserError(
            f"{where} (source {name}): has the columns {', '.join(row)} in an apo stage; expected chosen and rejected; "
            "take the source out of the mixture"
        )
    try:
        pair = encode_pair(
            tokenizer,
            row["chosen"],
            row["rejected"],
            template_kwargs=row.get("chat_template_kwargs"),
            tools=row.get("tools"),
            today=stage.today,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    ids = [np.array(side, PAIR_TYPES["chosen_ids"]) for side in (pair.chosen_ids, pair.rejected_ids)]
    masks = [np.array(side, PAIR_TYPES["chosen_mask"]) for side in (pair.chosen_trained, pair.rejected_trained)]
    if stage.last_turn_only:
        masks = [last_run(mask) for mask in masks]
    shared = num_shared(ids, masks)
    columns = (
        np.concatenate((np.array(pair.prompt_ids, PAIR_TYPES["prompt_ids"]), ids[0][:shared])),
        *(side[shared:] for side in ids),
        np.concatenate((np.zeros(len(pair.prompt_ids), PAIR_TYPES["prompt_mask"]), masks[0][:shared])),
        *(mask[shared:] for mask in masks),
    )
    return dict(zip(PAIR_TYPES, columns, strict=True))


def num_shared(ids: list[np.ndarray], masks: list[np.ndarray]) -> int:
    """Tokens both completions begin with, scored alike; each side keeps at least its last token to itself."""
    length = max(0, min(map(len, ids)) - 1)
    differs = (ids[0][:length] != ids[1][:length]) | (masks[0][:length] != masks[1][:length])
    return int(differs.argmax()) if differs.any() else length


def last_run(mask: np.ndarray) -> np.ndarray:
    """The mask with its last run of ones alone: the last reply, as headers part one reply from the next."""
    ones = np.flatnonzero(mask)
    breaks = np.flatnonzero(np.diff(ones) > 1)
    kept = np.zeros_like(mask)
    kept[ones[breaks[-1] + 1 :] if len(breaks) else ones] = 1
    return kept


def where_of(i: int, row: dict) -> str:
    """File and row number where the row knows them, else its place in the mixture."""
    return getattr(row, "where", f"row {i + 1} of the mixture")
