"""Other people's rows turned into ours: the shape of the columns, then the keys of rows and turns.

Every command reads rows through `as_row`, so all see the same ones.
"""

import re
from typing import Any

from smolpost.chat.reasoning import reasoning_ranges
from smolpost.data import row_shapes  # noqa: F401 - registers the library's own
from smolpost.data.keys import DESIRED, MARKS, REFUSED_IN_ROWS, ROW, is_empty, mark_of, refuse
from smolpost.data.row_shapes.shape import text_of, without
from smolpost.data.rows import Row
from smolpost.data.tools import own_tools
from smolpost.data.turns import own_turns, read_json
from smolpost.errors import UserError
from smolpost.registry import ROW_SHAPES
from smolpost.schema import Source

SYSTEM = ("system", "system_prompt", "system_message")  # columns that hold the system prompt
MODE_WORDS = re.compile(r"detailed thinking (on|off)")  # Llama-Nemotron's system prompt, which says only the mode
LISTS = ("messages", "conversations", "tools", "functions", "chat_template_kwargs")  # a text there is JSON
TEXT_OR_TURNS = ("prompt", "completion", "chosen", "rejected", "input")  # a text there may be JSON
TURNS_AS_TEXT = re.compile(r'\s*\[\s*\{\s*"(role|content|from|value)"')
CONVERSATIONS = ("messages", "chosen", "rejected")


def as_row(row: Row, source: Source, judged: bool = False) -> Row:
    """The row, as `read_slice` gives it, in our columns: by source.rename, by source.columns, then the keys by level.

    A system column becomes the first turn. Columns that nobody reads are kept, and named in `unread`.

    Args:
        judged: The reader follows labels: `label` is then true or false, whatever name and type it had. Other readers
            would train on undesired replies, so those are refused.
    Raises:
        UserError: The row cannot be read, a column is missing or not what source.columns says, or a key that changes
            what the row means cannot be followed. `validate_row` refuses rows of unknown shape.
    """
    if row.fault:
        raise UserError(row.fault)
    shape = ROW_SHAPES.get(source.columns)
    if shape is None:
        raise UserError(f"{source.path}: columns={source.columns!r} is unknown; use one of {', '.join(ROW_SHAPES)}")
    content = _with_json_read(_renamed(row, source.rename), row.where)
    unread: set[str] = set()
    content = _in_our_keys(shape(row.with_content(content), source), row.where, source, unread, judged)
    return row.with_content(content, tuple(sorted(unread)))


def row_for(row: Row, source: Source, layout: str) -> Row:
    """`as_row` for training on a layout of `data.settings`: of a row that has messages and a pair, one is left out."""
    row = as_row(row, source, judged=layout == "labelled")
    if "messages" in row and "chosen" in row and "rejected" in row:
        others = ("messages",) if layout in ("pairs", "labelled") else ("chosen", "rejected")
        return row.with_content(without(row, *others), tuple(sorted((*row.unread, *others))))
    return row


def _renamed(row: Row, names: dict[str, str]) -> dict:
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


def _with_json_read(row: dict, where: str) -> dict:
    """The row with the columns that hold JSON as text read."""
    content = {}
    for key, value in row.items():
        if key in LISTS or (key in TEXT_OR_TURNS and isinstance(value, str) and TURNS_AS_TEXT.match(value)):
            value = read_json(value, f"{where}: {key}")
        if value is not None:
            content[key] = value
    return content


# ---------------------------------------------------------------- keys


def _in_our_keys(row: dict, where: str, source: Source, unread: set[str], judged: bool) -> dict:
    """The row with ROW's keys, its turns with MESSAGE's; further columns stay, and `unread` gets their names.

    Raises:
        UserError: As `as_row`.
    """
    refuse(row, REFUSED_IN_ROWS, where)
    content = _with_label(row, where, judged)
    found = [key for key in CONVERSATIONS if isinstance(row.get(key), list)]
    tools = [(key, row[key]) for key in ("tools", "functions") if not is_empty(row.get(key))]
    marks = _row_marks(row, where) if found else {}
    for key in found:
        turns = _with_row_marks(row[key], marks, where) if key == "messages" else row[key]
        content[key], given = own_turns(turns, f"{where}: {key}", source.roles, unread)
        if key == "messages" and isinstance(number := row.get("completion_turns"), int) and number > 0:
            # Calls made at once become one turn.
            content["completion_turns"] = len(own_turns(turns[-number:], f"{where}: {key}", source.roles, set())[0])
        tools += [(f"{key}[].tools", value) for value in given]
    if found:
        usual = _last_reply_thinks(content[found[0]]) if source.mode_from_reply else source.enable_thinking
        content = _with_system(_with_mode(content, where, usual), found, where)
        if source.last_user_is_reply:
            content |= {key: _with_last_reply(content[key]) for key in found}
    if tools:
        if any(value != tools[0][1] for _, value in tools):
            names = " and ".join(dict.fromkeys(name for name, _ in tools))
            raise UserError(f"{where}: {names} have different tools; keep one of them")
        content["tools"] = own_tools(tools[0][1], f"{where}: tools")
        content.pop("functions", None)
    elif "tools" in content and is_empty(content["tools"]):
        del content["tools"]
    read = {*ROW, *(key for key in DESIRED if isinstance(content.get(key), bool)), *marks}
    unread |= {key for key, value in content.items() if key not in read and not is_empty(value)}
    return content


def _with_label(row: dict, where: str, judged: bool) -> dict:
    """The row with its label as true or false where labels are followed.

    Raises:
        UserError: The label is neither; or it marks an undesired reply, and labels are not followed.
    """
    if judged:
        label = mark_of(
            {key: row[key] for key in DESIRED if not is_empty(row.get(key))}, DESIRED, where, "it is desired"
        )
        return without(row, *DESIRED) | ({} if label is None else {"label": label})
    for key in DESIRED:
        if row.get(key) is False:
            raise UserError(f"{where}: {key}=false marks an undesired reply, and would be trained on; delete the row")
    return dict(row)


def _row_marks(row: dict, where: str) -> dict[str, Any]:
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


def _with_row_marks(messages: list, marks: dict[str, Any], where: str) -> list:
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


def _with_mode(row: dict, where: str, usual: bool | None) -> dict:
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


def _last_reply_thinks(turns: list[dict]) -> bool:
    reply = next((turn for turn in reversed(turns) if turn["role"] == "assistant"), {})
    return bool(reply.get("reasoning_content") or reasoning_ranges(reply.get("content") or ""))


def _says_mode(kwargs) -> bool:
    return isinstance(kwargs, dict) and isinstance(kwargs.get("enable_thinking"), bool)


def _with_system(row: dict, found: list[str], where: str) -> dict:
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


def _with_last_reply(messages: list) -> list:
    """The messages; a last user turn right after another user turn becomes a reply.

    SmolTalk2's split of everyday conversations labels its last replies in this way.
    """
    return [*messages[:-1], {**messages[-1], "role": "assistant"}] if ends_in_two_users(messages) else messages


def ends_in_two_users(messages: list[Any]) -> bool:
    """Whether the last two turns are both the user's."""
    return len(messages) > 1 and all(isinstance(m, dict) and m.get("role") == "user" for m in messages[-2:])
