"""ShareGPT's columns."""

from smolpost.data.row_shapes.shape import row_shape, without
from smolpost.data.rows import Row, kind_of
from smolpost.data.turns import known_roles
from smolpost.errors import UserError
from smolpost.schema import Source


@row_shape("sharegpt")
def sharegpt(row: Row, source: Source) -> dict:
    """`conversations` of {from, value}; with `chosen` and `rejected` it is the prompt of both."""
    where = row.where
    key = "messages" if "conversations" not in row else "conversations"
    turns, pair = row.get(key), "chosen" in row and "rejected" in row
    if turns is None and not pair:
        raise UserError(
            f"{where}: has the columns {', '.join(row) or 'none'}; columns=sharegpt expects conversations, a list of "
            "{from, value}; rename the column, or set columns to what the row is"
        )
    prompt = _turns([] if turns is None else turns, f"{where}: {key}", source.roles)
    rest = without(row, key, *(("chosen", "rejected") if pair else ()))
    if not pair:
        return {**rest, "messages": prompt}
    sides = {side: prompt + _turns(row[side], f"{where}: {side}", source.roles) for side in ("chosen", "rejected")}
    return {**rest, **sides}


def _turns(turns, where: str, roles: dict[str, str]) -> list[dict]:
    """Messages of a list of {from, value}, or of a single one; a turn's further keys are kept."""
    if isinstance(turns, dict):
        turns = [turns]
    if not isinstance(turns, list):
        raise UserError(f"{where} is {kind_of(turns)}; columns=sharegpt expects a list of {{from, value}}")
    return [_turn(turn, f"{where}[{i}]", roles) for i, turn in enumerate(turns)]


def _turn(turn, where: str, roles: dict[str, str]) -> dict:
    if isinstance(turn, dict) and "role" in turn and "from" not in turn:
        return turn
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        found = f"has the keys {', '.join(turn) or 'none'}" if isinstance(turn, dict) else f"is {kind_of(turn)}"
        raise UserError(f"{where} {found}; columns=sharegpt expects from and value; rename them")
    speaker, value = turn["from"], turn["value"]
    known = known_roles(roles)
    if not isinstance(speaker, str) or speaker not in known:
        raise UserError(
            f"{where}.from is {speaker!r:.80}; expected one of {', '.join(known)}; say what it stands for with the "
            f"source's roles, as roles: {{{speaker}: assistant}}"
        )
    if not isinstance(value, str):
        raise UserError(f"{where}.value is {kind_of(value)}; expected a string")
    return {"role": speaker, "content": value, **without(turn, "from", "value")}
