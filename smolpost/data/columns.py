"""Other people's columns turned into ours: ShareGPT, Alpaca, replies without their prompt, Berkeley's schemas."""

from smolpost.data.rows import Row, kind_of, parse_json
from smolpost.data.validate import RESULTS
from smolpost.errors import UserError
from smolpost.schema import Source

SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


def as_row(row: Row, source: Source) -> Row:
    """The row in our columns: source.rename first, then source.columns.

    smoltalk2 rows stay as they are, but where `chosen` and `rejected` are replies alone (strings, or messages that
    begin with a reply: TRL's formats), `prompt` (after `system`, if any) is put before both. sharegpt and alpaca become
    `messages`, or `chosen` and `rejected`; their other columns are kept. Function documents in Berkeley's types become
    JSON schemas.

    Raises:
        UserError: A column is missing or not what source.columns says. A row that fits no shape at all is left to
            `validate_row`.
    """
    mapping = MAPPINGS.get(source.columns)
    if mapping is None:
        raise UserError(f"{source.path}: columns={source.columns!r} is unknown; use one of {', '.join(MAPPINGS)}")
    content = mapping(renamed(row, source.rename), row.where)
    if isinstance(content.get("tools"), list):
        content = {**content, "tools": [json_schema_tool(tool) for tool in content["tools"]]}
    return Row(content, row.path, row.number)


def renamed(row: Row, names: dict[str, str]) -> dict:
    """The columns under their new names; a column that this row lacks is no error, as rows may lack optional ones."""
    content = {}
    for key, value in row.items():
        new = names.get(key, key)
        if new in content:
            raise UserError(
                f"{row.where}: rename gives two columns the name {new!r}; rename the row's own {new!r} to another name"
            )
        content[new] = value
    return content


def from_smoltalk2(row: dict, where: str) -> dict:
    prompt, sides = row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    if any(side is None for side in sides):
        return row
    texts = any(isinstance(side, str) for side in sides)
    if texts and not prompt:
        raise UserError(
            f"{where}: chosen and rejected are texts and there is no prompt; expected a prompt column (string or "
            "messages), or two full conversations; rename the prompt's column, or set columns: sharegpt or alpaca"
        )
    if not isinstance(prompt, str | list):
        return row
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not any(is_reply(side, turns) for side in sides):
        return row
    turns = system_turn(row, where) + turns
    whole = [whole_conversation(side, turns) for side in sides]
    return {**without(row, "system"), "chosen": whole[0], "rejected": whole[1]}


def is_reply(side, turns: list) -> bool:
    """Whether a side is what comes after the prompt's turns, not a conversation that begins with them."""
    if isinstance(side, str):
        return True
    first = side[0] if isinstance(side, list) and side else None
    role = first.get("role") if isinstance(first, dict) else None
    return role in ("assistant", *RESULTS) and side[: len(turns)] != turns


def whole_conversation(side, turns: list):
    if not is_reply(side, turns):
        return side
    return turns + ([{"role": "assistant", "content": side}] if isinstance(side, str) else side)


def from_sharegpt(row: dict, where: str) -> dict:
    key = "messages" if row.get("conversations") is None else "conversations"
    turns, pair = row.get(key), row.get("chosen") is not None and row.get("rejected") is not None
    if turns is None and not pair:
        raise UserError(
            f"{where}: has the columns {', '.join(row) or 'none'}; columns=sharegpt expects conversations, a list of "
            "{from, value}; rename the column, or set columns to what the row is"
        )
    prompt = system_turn(row, where) + sharegpt_turns([] if turns is None else turns, f"{where}: {key}")
    rest = without(row, key, "system", *(("chosen", "rejected") if pair else ()))
    if isinstance(row.get("tools"), str):
        rest["tools"] = parse_json(row["tools"] or "null", f"{where}: tools")
    if not pair:
        return {**rest, "messages": prompt}
    sides = {side: prompt + sharegpt_turns(row[side], f"{where}: {side}") for side in ("chosen", "rejected")}
    return {**rest, **sides}


def sharegpt_turns(turns, where: str) -> list[dict]:
    """Messages of a list of {from, value}, or of a single one; a turn's further keys are kept."""
    if isinstance(turns, dict):
        turns = [turns]
    if not isinstance(turns, list):
        raise UserError(f"{where} is {kind_of(turns)}; columns=sharegpt expects a list of {{from, value}}")
    return [sharegpt_turn(turn, f"{where}[{i}]") for i, turn in enumerate(turns)]


def sharegpt_turn(turn, where: str) -> dict:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        found = f"has the keys {', '.join(turn) or 'none'}" if isinstance(turn, dict) else f"is {kind_of(turn)}"
        other = "; set columns: smoltalk2" if isinstance(turn, dict) and "role" in turn else ""
        raise UserError(f"{where} {found}; columns=sharegpt expects from and value{other or '; rename them'}")
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise UserError(f"{where}.from is {speaker!r:.80}; expected one of {', '.join(SHAREGPT_ROLES)}; rename it")
    if not isinstance(value, str):
        raise UserError(f"{where}.value is {kind_of(value)}; expected a string")
    message = {"role": SHAREGPT_ROLES[speaker], **without(turn, "from", "value")}
    if speaker != "function_call":
        return message | {"content": value}
    calls = parse_json(value, f"{where}.value")
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise UserError(f"{where}.value is {value!r:.80}; expected a call as JSON, with name and arguments")
    return message | {"tool_calls": [{"type": "function", "function": call} for call in calls]}


def from_alpaca(row: dict, where: str) -> dict:
    """The input follows the instruction on a line of its own, as LLaMA-Factory joins them."""
    pair = ("chosen", "rejected") if row.get("chosen") is not None and row.get("rejected") is not None else ()
    needed = ("instruction", *(pair or ("output",)))
    if missing := [key for key in needed if row.get(key) is None]:
        raise UserError(
            f"{where}: has no {' and no '.join(missing)} but the columns {', '.join(row) or 'none'}; columns=alpaca "
            "expects instruction, and output or both chosen and rejected; rename the columns"
        )
    turns = system_turn(row, where)
    history = row.get("history") or []
    for i, past in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(past, list | tuple) or len(past) != 2 or not all(isinstance(text, str) for text in past):
            raise UserError(f"{where}: history[{i}] is {past!r:.80}; expected a pair of texts: user, assistant")
        turns += [{"role": "user", "content": past[0]}, {"role": "assistant", "content": past[1]}]
    asked = [text for text in (text_of(row, "instruction", where), text_of(row, "input", where)) if text]
    turns.append({"role": "user", "content": "\n".join(asked)})
    rest = without(row, "instruction", "input", "output", "system", "history", *pair)
    replies = {key: [*turns, {"role": "assistant", "content": text_of(row, key, where)}] for key in needed[1:]}
    return {**rest, **(replies if pair else {"messages": replies["output"]})}


MAPPINGS = {"smoltalk2": from_smoltalk2, "sharegpt": from_sharegpt, "alpaca": from_alpaca}


def system_turn(row: dict, where: str) -> list[dict]:
    text = text_of(row, "system", where)
    return [{"role": "system", "content": text}] if text else []


def text_of(row: dict, key: str, where: str) -> str:
    """The column's text, "" where it is missing."""
    text = row.get(key)
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {key} is {kind_of(text)}; expected a string or null")
    return text or ""


def without(row: dict, *keys: str) -> dict:
    return {key: value for key, value in row.items() if key not in keys}


# Berkeley's function documents name Python's types; "any" is a JSON schema without a type.
SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}


def json_schema_tool(tool):
    """The function document with parameters in JSON schema's types; what is standard already stays equal."""
    if not isinstance(tool, dict):
        return tool
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": json_schema_tool(tool["function"])}
    return {key: json_schema(value) if key == "parameters" else value for key, value in tool.items()}


def json_schema(schema):
    if isinstance(schema, list):
        return [json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    standard = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            value = SCHEMA_TYPES.get(value, value)
            if value is None:
                continue
        elif key == "properties" and isinstance(value, dict):  # its keys are names, "type" may be one
            value = {name: json_schema(inner) for name, inner in value.items()}
        elif key in ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf", "not"):
            value = json_schema(value)
        standard[key] = value
    return standard
