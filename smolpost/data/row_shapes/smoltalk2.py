"""SmolTalk2's columns, which are ours, and those of others that can be told by their names."""

from smolpost.data.row_shapes.shape import is_turns, row_shape, text_of, without
from smolpost.data.rows import Row, kind_of
from smolpost.data.turns import called_in, read_json
from smolpost.errors import UserError
from smolpost.schema import Source


@row_shape("smoltalk2")
def smoltalk2(row: Row, source: Source) -> dict:
    """Our own columns, and shapes that are told by their columns.

    These are `conversations` of role and content, TRL's `prompt` and `completion` (the completion trains),
    Llama-Nemotron's `input` list and `output`, xLAM's `query` and `answers`, ms-swift's `rejected_response`. Where
    `chosen` and `rejected` are replies alone (strings, or messages that begin with a reply: TRL's formats), `prompt` is
    put before both. A row that fits none of them stays as it is, for `validate_row` to refuse.
    """
    if "chosen" in row and "rejected" in row:
        return _from_pair(row, row.where)
    if "messages" in row:
        return _from_rejected_response(row) if row.get("rejected_response") else row
    if "text" in row:
        return row
    if is_turns(row.get("conversations")):
        return without(row, "conversations") | {"messages": row["conversations"]}
    if "prompt" in row and "completion" in row:
        return from_completion(row, row.where)
    if is_turns(row.get("input")) and "output" in row:
        reply = {"role": "assistant", "content": text_of(row, "output", row.where)}
        return without(row, "input", "output") | {"messages": [*row["input"], reply]}
    if "query" in row and "answers" in row:
        return _from_xlam(row, row.where)
    return row


def _from_pair(row: dict, where: str) -> dict:
    """The sides as full conversations. A row that has messages too is left to the stage that reads it."""
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    texts = any(isinstance(side, str) for side in sides)
    if texts and not prompt and "messages" not in row:
        raise UserError(
            f"{where}: chosen and rejected are texts and there is no prompt; expected a prompt column (string or "
            "messages), or two full conversations; rename the prompt's column, or set columns: sharegpt or alpaca"
        )
    if not prompt or not isinstance(prompt, str | list):
        return row
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not any(_is_reply(side, turns) for side in sides):
        return row
    whole = [_whole_conversation(side, turns) for side in sides]
    return {**row, "chosen": whole[0], "rejected": whole[1]}


def _is_reply(side, turns: list) -> bool:
    """Whether a side is what comes after the prompt's turns, not a conversation that begins with them."""
    if isinstance(side, str):
        return True
    first = side[0] if isinstance(side, list) and side else None
    role = first.get("role") if isinstance(first, dict) else None
    return role in ("assistant", "tool", "function") and side[: len(turns)] != turns


def _whole_conversation(side, turns: list):
    if not _is_reply(side, turns):
        return side
    return turns + ([{"role": "assistant", "content": side}] if isinstance(side, str) else side)


def _from_rejected_response(row: dict) -> dict:
    """ms-swift's pair: the messages, whose last turn another reply would take the place of."""
    other = row["rejected_response"]
    reply = [{"role": "assistant", "content": other}] if isinstance(other, str) else other
    rejected = row["messages"][:-1] + reply if isinstance(row["messages"], list) and isinstance(reply, list) else other
    return without(row, "rejected_response") | {"chosen": row["messages"], "rejected": rejected}


def from_completion(row: dict, where: str) -> dict:
    """TRL's prompt and completion, of which the completion trains; completion_turns says how many turns that is."""
    sides = {}
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        sides[key] = [{"role": role, "content": row[key]}] if isinstance(row[key], str) else row[key]
        if not isinstance(sides[key], list):
            raise UserError(f"{where}: {key} is {kind_of(row[key])}; expected a string or a list of messages")
    context = [
        {**turn, "train": False} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn
        for turn in sides["prompt"]
    ]
    messages = {"messages": context + sides["completion"], "completion_turns": len(sides["completion"])}
    return without(row, "prompt", "completion") | messages


def _from_xlam(row: dict, where: str) -> dict:
    asked = {"role": "user", "content": row["query"]}
    calls = called_in(read_json(row["answers"], f"{where}: answers"), f"{where}: answers", set())
    return without(row, "query", "answers") | {"messages": [asked, {"role": "assistant", "tool_calls": calls}]}
