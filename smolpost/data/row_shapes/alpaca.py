"""Alpaca's columns."""

from smolpost.data.keys import is_empty
from smolpost.data.row_shapes.shape import is_turns, row_shape, text_of, without
from smolpost.data.row_shapes.smoltalk2 import from_completion
from smolpost.data.rows import Row
from smolpost.errors import UserError
from smolpost.schema import Source


@row_shape("alpaca")
def alpaca(row: Row, source: Source) -> dict:
    """`instruction`, `input` and `history`, with `output` or with both `chosen` and `rejected`.

    The input follows the instruction on a line of its own, as LLaMA-Factory joins them.
    """
    where = row.where
    pair = ("chosen", "rejected") if "chosen" in row and "rejected" in row else ()
    needed = ("instruction", *(pair or ("output",)))
    if missing := [key for key in needed if key not in row]:
        raise UserError(
            f"{where}: has no {' and no '.join(missing)} but the columns {', '.join(row) or 'none'}; columns=alpaca "
            "expects instruction, and output or both chosen and rejected; rename the columns"
        )
    if not pair and any(is_turns(row[key]) for key in needed):  # TRL's turns under Alpaca's names
        return from_completion(_renamed_turns(row, where), where)
    turns: list[dict] = []
    history = row.get("history") or []
    for i, past in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(past, list | tuple) or len(past) != 2 or not all(isinstance(text, str) for text in past):
            raise UserError(f"{where}: history[{i}] is {past!r:.80}; expected a pair of texts: user, assistant")
        turns += [{"role": "user", "content": past[0]}, {"role": "assistant", "content": past[1]}]
    asked = [text for text in (text_of(row, "instruction", where), text_of(row, "input", where)) if text]
    turns.append({"role": "user", "content": "\n".join(asked)})
    rest = without(row, "instruction", "input", "output", "history", *pair)
    replies = {key: [*turns, {"role": "assistant", "content": text_of(row, key, where)}] for key in needed[1:]}
    return {**rest, **(replies if pair else {"messages": replies["output"]})}


def _renamed_turns(row: dict, where: str) -> dict:
    """An Alpaca row of turns as prompt and completion; there is no place for a text beside them."""
    if texts := [key for key in ("input", "history") if not is_empty(row.get(key))]:
        raise UserError(
            f"{where}: has {texts[0]} beside an instruction that is a list of turns; move it into the turns"
        )
    rest = without(row, "instruction", "output", "input", "history")
    return rest | {"prompt": row["instruction"], "completion": row["output"]}
