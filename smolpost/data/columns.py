"""Other people's rows turned into ours: the shape of the columns, then the keys of rows and turns.

Every command reads rows through `as_row`, so all see the same ones.
"""

import re
from typing import Any

from smolpost.data.keys import DESIRED, MARKS, REFUSED_IN_ROWS, ROW, is_empty, mark_of, refuse
from smolpost.data.rows import Row, kind_of
from smolpost.data.tools import own_tools
from smolpost.data.turns import called_in, known_roles, own_turns, read_json
from smolpost.errors import UserError
from smolpost.schema import Source

SYSTEM = ("system", "system_prompt", "system_message")  # columns that hold the system prompt
MODE_WORDS = re.compile(r"detailed thinking (on|off)")  # Llama-Nemotron's system prompt, which says only the mode
LISTS = ("messages", "conversations", "tools", "functions", "chat_template_kwargs")  # a text there is JSON
TEXT_OR_TURNS = ("prompt", "completion", "chosen", "rejected", "input")  # a text there may be JSON
TURNS_AS_TEXT = re.compile(r'\s*\[\s*\{\s*"(role|content|from|value)"')
CONVERSATIONS = ("messages", "chosen", "rejected")


def as_row(row: Row, source: Source) -> Row:
    """The row, as `read_slice` gives it, in our columns: by source.rename, by source.columns, then the keys by level.

    smoltalk2 rows keep their columns, except for formats that are recognised by their columns: `conversations` of role
    and content, TRL's `prompt` and `completion` (only the completion trains), Llama-Nemotron's `input` list and
    `output`, xLAM's `query` and `answers`, ms-swift's `rejected_response`. If `chosen` and `rejected` are only replies
    (strings, or messages that begin with a reply, as in TRL's formats), `prompt` is put before both. sharegpt and
    alpaca rows become `messages`, or `chosen` and `rejected`. A system column becomes the first turn. Unknown columns
    are kept and named in `unread`.

    Raises:
        UserError: The row cannot be read, a column is missing or not what source.columns says, or a key that changes
            what the row means cannot be followed. `validate_row` refuses rows of unknown shape.
    """
    if row.fault:
        raise UserError(row.fault)
    mapping = MAPPINGS.get(source.columns)
    if mapping is None:
        raise UserError(f"{source.path}: columns={source.columns!r} is unknown; use one of {', '.join(MAPPINGS)}")
    content = with_json_read(renamed(row, source.rename), row.where)
    unread: set[str] = set()
    content = in_our_keys(mapping(content, row.where, source.roles), row.where, source, unread)
    return row.with_content(content, tuple(sorted(unread)))


def row_for(row: Row, source: Source, kind: str) -> Row:
    """`as_row` for a training stage of a kind: of a row that has messages and a pair, the stage reads one."""
    row = as_row(row, source)
    if "messages" in row and "chosen" in row and "rejected" in row:
        others = ("messages",) if kind == "apo" else ("chosen", "rejected")
        return row.with_content(without(row, *others), tuple(sorted((*row.unread, *others))))
    return row


def renamed(row: Row, names: dict[str, str]) -> dict:
    """The columns under their new names; a column that a row lacks is not an error."""
    content = {}
    for key, value in row.items():
        new = names.get(key, key)
        if new in content:
            raise UserError(
                f"{row.where}: rename gives two columns the name {new!r}; rename the row's own {new!r} to another name"
            )
        content[new] = value
    return content


def with_json_read(row: dict, where: str) -> dict:
    """The row with the columns that hold JSON as text read."""
    content = {}
    for key, value in row.items():
        if key in LISTS or (key in TEXT_OR_TURNS and isinstance(value, str) and TURNS_AS_TEXT.match(value)):
            value = read_json(value, f"{where}: {key}")
        if value is not None:
            content[key] = value
    return content


# ---------------------------------------------------------------- shapes


def from_smoltalk2(row: dict, where: str, roles: dict[str, str]) -> dict:
    if "chosen" in row and "rejected" in row:
        return from_pair(row, where)
    if "messages" in row:
        return from_rejected_response(row) if row.get("rejected_response") else row
    if "text" in row:
        return row
    if is_turns(row.get("conversations")):
        return without(row, "conversations") | {"messages": row["conversations"]}
    if "prompt" in row and "completion" in row:
        return from_completion(row, where)
    if is_turns(row.get("input")) and "output" in row:
        reply = {"role": "assistant", "content": text_of(row, "output", where)}
        return without(row, "input", "output") | {"messages": [*row["input"], reply]}
    if "query" in row and "answers" in row:
        return from_xlam(row, where)
    return row


def is_turns(value) -> bool:
    return isinstance(value, list) and any(isinstance(turn, dict) and "role" in turn for turn in value)


def from_pair(row: dict, where: str) -> dict:
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
    if not any(is_reply(side, turns) for side in sides):
        return row
    whole = [whole_conversation(side, turns) for side in sides]
    return {**row, "chosen": whole[0], "rejected": whole[1]}


def is_reply(side, turns: list) -> bool:
    """Whether a side is what comes after the prompt's turns, not a conversation that begins with them."""
    if isinstance(side, str):
        return True
    first = side[0] if isinstance(side, list) and side else None
    role = first.get("role") if isinstance(first, dict) else None
    return role in ("assistant", "tool", "function") and side[: len(turns)] != turns


def whole_conversation(side, turns: list):
    if not is_reply(side, turns):
        return side
    return turns + ([{"role": "assistant", "content": side}] if isinstance(side, str) else side)


def from_rejected_response(row: dict) -> dict:
    """ms-swift's pair: the messages, whose last turn another reply would take the place of."""
    other = row["rejected_response"]
    reply = [{"role": "assistant", "content": other}] if isinstance(other, str) else other
    rejected = row["messages"][:-1] + reply if isinstance(row["messages"], list) and isinstance(reply, list) else other
    return without(row, "rejected_response") | {"chosen": row["messages"], "rejected": rejected}


def from_completion(row: dict, where: str) -> dict:
    """TRL's prompt and completion, of which the completion trains."""
    sides = {}
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        sides[key] = [{"role": role, "content": row[key]}] if isinstance(row[key], str) else row[key]
        if not isinstance(sides[key], list):
            raise UserError(f"{where}: {key} is {kind_of(row[key])}; expected a string or a list of messages")
    context = [
        {**turn, "train": False} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn
        for turn in sides["prompt"]
    ]
    return without(row, "prompt", "completion") | {"messages": context + sides["completion"]}


def from_xlam(row: dict, where: str) -> dict:
    asked = {"role": "user", "content": row["query"]}
    calls = called_in(read_json(row["answers"], f"{where}: answers"), f"{where}: answers", set())
    return without(row, "query", "answers") | {"messages": [asked, {"role": "assistant", "tool_calls": calls}]}


def from_sharegpt(row: dict, where: str, roles: dict[str, str]) -> dict:
    key = "messages" if "conversations" not in row else "conversations"
    turns, pair = row.get(key), "chosen" in row and "rejected" in row
    if turns is None and not pair:
        raise UserError(
            f"{where}: has the columns {', '.join(row) or 'none'}; columns=sharegpt expects conversations, a list of "
            "{from, value}; rename the column, or set columns to what the row is"
        )
    prompt = sharegpt_turns([] if turns is None else turns, f"{where}: {key}", roles)
    rest = without(row, key, *(("chosen", "rejected") if pair else ()))
    if not pair:
        return {**rest, "messages": prompt}
    sides = {side: prompt + sharegpt_turns(row[side], f"{where}: {side}", roles) for side in ("chosen", "rejected")}
    return {**rest, **sides}


def sharegpt_turns(turns, where: str, roles: dict[str, str]) -> list[dict]:
    """Messages of a list of {from, value}, or of a single one; a turn's further keys are kept."""
    if isinstance(turns, dict):
        turns = [turns]
    if not isinstance(turns, list):
        raise UserError(f"{where} is {kind_of(turns)}; columns=sharegpt expects a list of {{from, value}}")
    return [sharegpt_turn(turn, f"{where}[{i}]", roles) for i, turn in enumerate(turns)]


def sharegpt_turn(turn, where: str, roles: dict[str, str]) -> dict:
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


def from_alpaca(row: dict, where: str, roles: dict[str, str]) -> dict:
    """The input follows the instruction on a line of its own, as LLaMA-Factory joins them."""
    pair = ("chosen", "rejected") if "chosen" in row and "rejected" in row else ()
    needed = ("instruction", *(pair or ("output",)))
    if missing := [key for key in needed if key not in row]:
        raise UserError(
            f"{where}: has no {' and no '.join(missing)} but the columns {', '.join(row) or 'none'}; columns=alpaca "
            "expects instruction, and output or both chosen and rejected; rename the columns"
        )
    if not pair and any(is_turns(row[key]) for key in needed):  # TRL's turns under Alpaca's names
        return from_completion(renamed_turns(row, where), where)
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


def renamed_turns(row: dict, where: str) -> dict:
    """An Alpaca row of turns as prompt and completion; there is no place for a text beside them."""
    if texts := [key for key in ("input", "history") if not is_empty(row.get(key))]:
        raise UserError(
            f"{where}: has {texts[0]} beside an instruction that is a list of turns; move it into the turns"
        )
    rest = without(row, "instruction", "output", "input", "history")
    return rest | {"prompt": row["instruction"], "completion": row["output"]}


MAPPINGS = {"smoltalk2": from_smoltalk2, "sharegpt": from_sharegpt, "alpaca": from_alpaca}


# ---------------------------------------------------------------- keys


def in_our_keys(row: dict, where: str, source: Source, unread: set[str]) -> dict:
    """The row with ROW's keys, its turns with MESSAGE's; further columns stay, and `unread` gets their names.

    Raises:
        UserError: As `as_row`.
    """
    refuse(row, REFUSED_IN_ROWS, where)
    for key in DESIRED:
        if row.get(key) is False:
            raise UserError(f"{where}: {key}=false marks an undesired reply, and would be trained on; delete the row")
    content = dict(row)
    found = [key for key in CONVERSATIONS if isinstance(row.get(key), list)]
    tools = [(key, row[key]) for key in ("tools", "functions") if not is_empty(row.get(key))]
    marks = row_marks(row, where) if found else {}
    for key in found:
        turns = with_row_marks(row[key], marks, where) if key == "messages" else row[key]
        content[key], given = own_turns(turns, f"{where}: {key}", source.roles, unread)
        tools += [(f"{key}[].tools", value) for value in given]
    if found:
        content = with_system(with_mode(content, where, source.enable_thinking), found, where)
        if source.last_user_is_reply:
            content |= {key: with_last_reply(content[key]) for key in found}
    if tools:
        if any(value != tools[0][1] for _, value in tools):
            names = " and ".join(dict.fromkeys(name for name, _ in tools))
            raise UserError(f"{where}: {names} have different tools; keep one of them")
        content["tools"] = own_tools(tools[0][1], f"{where}: tools")
        content.pop("functions", None)
    elif "tools" in content and is_empty(content["tools"]):
        del content["tools"]
    read = {*ROW, *(key for key in DESIRED if row.get(key) is True), *marks}
    unread |= {key for key, value in content.items() if key not in read and not is_empty(value)}
    return content


def row_marks(row: dict, where: str) -> dict[str, Any]:
    """The row's own marks: true, false, 1 or 0 for all turns, or a list with one for each turn. A row's loss is a mark
    only as true, false or a list: a number there is a measurement."""
    marks = {key: row[key] for key in MARKS if isinstance(row.get(key), int | float | list) and row[key] != []}
    if isinstance(marks.get("loss"), int | float) and not isinstance(marks["loss"], bool):
        del marks["loss"]
    for key, value in marks.items():
        if isinstance(value, int | float) and value not in (0, 1):
            raise UserError(
                f"{where}: {key}={value} may be meant as the weight of the row's "
                "loss, which is not supported; expected true, "
                "false or a list with one mark for each turn; set loss_weight of a source, or rename the column"
            )
    return marks


def with_row_marks(messages: list, marks: dict[str, Any], where: str) -> list:
    """The messages, marked as the row's own marks say."""
    for key, value in marks.items():
        values = value if isinstance(value, list) else [value] * len(messages)
        if len(values) != len(messages):
            raise UserError(f"{where}: {key} has {len(values)} marks for {len(messages)} turns; give one for each turn")
        flags = [mark_of({key: mark}, (key,), f"{where}: {key}[{i}]") for i, mark in enumerate(values)]
        messages = [
            message if flag or not isinstance(message, dict) else {**message, "train": False}
            for message, flag in zip(messages, flags, strict=True)
        ]
    return messages


def with_mode(row: dict, where: str, usual: bool | None) -> dict:
    """What the row's own columns say of its mode: enable_thinking, and Llama-Nemotron's reasoning and system prompt.

    Args:
        usual: The mode of rows that do not say, or None.
    """
    said: dict[str, bool] = {}
    if isinstance(row.get("enable_thinking"), bool):
        said["enable_thinking"] = row["enable_thinking"]
    if row.get("reasoning") in ("on", "off"):
        said["reasoning"] = row["reasoning"] == "on"
    for key in SYSTEM:
        if isinstance(row.get(key), str) and (word := MODE_WORDS.fullmatch(row[key].strip())):
            said[key] = word[1] == "on"
    kwargs = row.get("chat_template_kwargs")
    if kwargs is None or isinstance(kwargs, dict):
        stated = {**said, **({"chat_template_kwargs": kwargs["enable_thinking"]} if _says_mode(kwargs) else {})}
        if len(set(stated.values())) > 1:
            raise UserError(f"{where}: {' and '.join(stated)} disagree on whether the reply thinks; keep one of them")
        thinks = next(iter(said.values()), usual if "enable_thinking" not in (kwargs or {}) else None)
        if thinks is not None:
            row = {**row, "chat_template_kwargs": {**(kwargs or {}), "enable_thinking": thinks}}
    return without(row, *said)


def _says_mode(kwargs) -> bool:
    return isinstance(kwargs, dict) and isinstance(kwargs.get("enable_thinking"), bool)


def with_system(row: dict, found: list[str], where: str) -> dict:
    """The row whose conversations begin with the text of its system column."""
    texts = {key: text for key in SYSTEM if (text := text_of(row, key, where))}
    if len(set(texts.values())) > 1:
        raise UserError(f"{where}: {' and '.join(texts)} differ; keep one of them")
    content = without(row, *SYSTEM)
    for text in dict.fromkeys(texts.values()):
        for key in found:
            first = content[key][0] if content[key] and isinstance(content[key][0], dict) else {}
            if first.get("role") != "system":
                content[key] = [{"role": "system", "content": text}, *content[key]]
            elif first.get("content") != text:
                name = next(iter(texts))
                raise UserError(f"{where}: has the column {name} and another system turn in {key}; keep one of them")
    return content


def with_last_reply(messages: list) -> list:
    """The messages; a last user turn right after another user turn becomes a reply.

    SmolTalk2's split of everyday conversations labels its last replies in this way.
    """
    return [*messages[:-1], {**messages[-1], "role": "assistant"}] if ends_in_two_users(messages) else messages


def ends_in_two_users(messages: list[Any]) -> bool:
    return len(messages) > 1 and all(isinstance(m, dict) and m.get("role") == "user" for m in messages[-2:])


def text_of(row: dict, key: str, where: str) -> str:
    """The column's text; "" if it is missing."""
    text = row.get(key)
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {key} is {kind_of(text)}; expected a string or null")
    return text or ""


def without(row: dict, *keys: str) -> dict:
    return {key: value for key, value in row.items() if key not in keys}
