"""Rows cut into a prompt and its completion: judged ones with their label, and preference pairs taken apart."""

import numpy as np

from smolpost.chat.fates import Fate
from smolpost.chat.masks import EncodedCompletion, encode_completion, num_common_messages
from smolpost.chat.render import clean_messages
from smolpost.chat.shown import Modes
from smolpost.data.rendering import fault_of, notes_of, trained_modes
from smolpost.data.rows import Row
from smolpost.data.settings import Rows
from smolpost.data.tokenized import Tokenized, policy_of, refused
from smolpost.data.validate import validate_row
from smolpost.errors import UserError

Side = tuple[list[dict], int]  # messages, and how many of them are the prompt


def tokenize_completions(stage: Rows, rows: list[Row], tokenizer) -> list[Tokenized]:
    """Prompt and completion of each row; of the layout `labelled`, those of the desired, then of the undesired side.

    A side that a row does not have is empty. A refused row has its reason.
    """
    modes, tokenized = trained_modes(tokenizer, stage), []
    is_labelled = stage.layout == "labelled"
    for row in rows:
        try:
            if row.fault:
                raise UserError(row.fault)
            sides = _judged(row) if is_labelled else [_unjudged(row)]
            tokenized.append(_tokenize_sides(stage, row, sides, tokenizer, modes))
        except UserError as error:
            tokenized.append(refused(str(error), 4 if is_labelled else 2))
    return tokenized


def _tokenize_sides(stage: Rows, row: Row, sides: list[Side | None], tokenizer, modes: Modes | None) -> Tokenized:
    """
    Args:
        modes: As `notes_of`.
    Raises:
        UserError: The row is refused.
    """
    ids, fates, found = [], [], []
    for side in sides:
        if side is None:
            ids += [np.zeros(0, np.int32)] * 2
            fates += [np.zeros(0, np.int8)] * 2
            continue
        encoded = _encode(stage, row, side, tokenizer)
        found.append(encoded)
        ids += [np.array(part, np.int32) for part in (encoded.prompt_ids, encoded.completion_ids)]
        fates += [np.array(part, np.int8) for part in (encoded.prompt_fates, encoded.completion_fates)]
        fates[-2][:1] = Fate.FIRST
    notes = tuple(dict.fromkeys(note for encoded in found for note in notes_of(row, encoded, modes)))
    return Tokenized(ids, fates, sum(encoded.neutralised for encoded in found), found[0].thinks, notes=notes)


def _encode(stage: Rows, row: Row, side: Side, tokenizer) -> EncodedCompletion:
    messages, num_prompt = side
    try:
        encoded = encode_completion(
            tokenizer,
            messages,
            num_prompt,
            template_kwargs=row.get("chat_template_kwargs"),
            tools=row.get("tools"),
            today=stage.today,
            policy=policy_of(stage),
        )
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    if fault := fault_of(row, encoded.lost):
        raise UserError(fault)
    return encoded


def _judged(row: Row) -> list[Side | None]:
    """The desired side and the undesired one; a row with a label has one of them, a pair has both."""
    if validate_row(row, row.where) == "preference":
        if "label" in row:
            raise UserError(f"{row.where}: has chosen and rejected and also a label; remove the label or the pair")
        chosen, rejected = clean_messages(row["chosen"]), clean_messages(row["rejected"])
        num_prompt = num_common_messages(chosen, rejected)
        return [(chosen, num_prompt), (rejected, num_prompt)]
    side = _unjudged(row)
    if "label" not in row:
        raise UserError(
            f"{row.where}: has no label, which says whether its reply is desired; expected label: true or false, or "
            "chosen and rejected; if another column says it, set the source's rename: {COLUMN: label}"
        )
    return [side, None] if row["label"] else [None, side]


def _unjudged(row: Row) -> Side:
    """The messages and where their completion begins: completion_turns before the end, or at the last reply."""
    if (shape := validate_row(row, row.where)) != "messages":
        raise UserError(
            f"{row.where}: is a {shape} row, and the stage trains on prompts and their completions; expected messages, "
            "or prompt and completion; take the source out of the mixture"
        )
    messages, number = row["messages"], row.get("completion_turns")
    if number is None:
        return messages, max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 < number < len(messages):
        raise UserError(
            f"{row.where}: completion_turns={number!r:.40} is not one of the turns after the first, 1 to "
            f"{len(messages) - 1}; correct it, or remove it to judge the last reply alone"
        )
    return messages, len(messages) - number
