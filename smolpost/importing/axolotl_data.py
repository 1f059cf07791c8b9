"""Datasets of Axolotl's settings: their types, fields and roles."""

from dataclasses import dataclass, field
from typing import Any

from smolpost.errors import UserError
from smolpost.importing.axolotl_keys import DATASET_LEFT_OUT
from smolpost.importing.draft import Draft
from smolpost.importing.keys import Keys
from smolpost.importing.sources import Sources, held_out, unread
from smolpost.screen import shown

OWN_TEXT = "Axolotl puts its own words around instruction and answer; here they are turns of the chat template"
# Type without what follows its first point or colon -> columns, and renamed columns.
TYPES: dict[str, tuple[str, dict[str, str]]] = {
    "chat_template": ("smoltalk2", {}),
    "sharegpt": ("sharegpt", {}),
    "alpaca": ("alpaca", {}),
    "alpaca_chat": ("alpaca", {}),
    "alpaca_instruct": ("alpaca", {}),
    "alpaca_w_system": ("alpaca", {}),
    "gpteacher": ("alpaca", {"response": "output"}),
    "completion": ("smoltalk2", {}),
    "pretrain": ("smoltalk2", {}),
}
TURNED = {  # whole type -> renamed columns, where they differ from the type's
    "alpaca_chat.load_qa": {"question": "instruction", "answer": "output"},
    "alpaca_chat.load_camel_ai": {"message_1": "instruction", "message_2": "output"},
    "alpaca_w_system.load_open_orca": {"question": "instruction", "response": "output", "system_prompt": "system"},
}
# Of pairs: the part after the point -> renamed columns.
PAIR_TYPES = {
    "intel": {"question": "prompt"},
    "icr": {"input": "prompt"},
    "argilla": {"instruction": "prompt", "chosen_response": "chosen", "rejected_response": "rejected"},
    "argilla_chat": {},
    "prompt_pairs": {},
    "ultra": {},
    "default": {},
}
PAIR_COLUMNS = ("system", "prompt", "chosen", "rejected", "completion", "label")


@dataclass
class Rows:
    """What the datasets say of the stage.

    Attributes:
        template: Axolotl's name of a chat template, or None.
        train_roles: Roles that train.
        roles_said: Whether a dataset says them.
        only_text: Whether all rows are plain text.
    """

    template: str | None = None
    train_roles: list[str] = field(default_factory=lambda: ["assistant"])
    roles_said: bool = False
    only_text: bool = False


def datasets(draft: Draft, mixture: str) -> Rows:
    """Write the mixture.

    Args:
        mixture: Its name under `data`.
    Raises:
        UserError: The file names no dataset.
    """
    keys, rows = draft.keys, Rows()
    entries = [*keys.mappings("datasets"), *keys.mappings("pretraining_dataset")]
    draft.told.update(("datasets", "pretraining_dataset"))
    if not entries:
        raise UserError(f"{shown(draft.file)}: names no dataset; add datasets, with path and type for each")
    sources, texts = Sources(draft, mixture, held_out(draft, "val_set_size")), []
    for entry in entries:
        path = entry.take("path", str)
        if path is None:
            raise UserError(f"{shown(draft.file)}: {entry.where}path has no value; name the dataset")
        fields = _pair(draft, entry, rows) if mixture == "preference" else _row(draft, entry, rows)
        texts.append(fields.pop("text", False))
        shards = entry.take("shards", int)
        if entry.take("shards_idx", int):
            draft.differs(f"{entry.where}shards_idx", "a random part of the rows is kept")
        sources.add(
            entry.where.removesuffix("."),
            path,
            files=entry.values.get("data_files"),
            split=entry.take("split", str, "train"),
            weight=1 / shards if shards else 1.0,
            note=f"one of {shards} shards: a random part of the rows" if shards else "",
            subset=entry.take("name", str),
            revision=entry.take("revision", str),
            **fields,
        )
        entry.read.add("data_files")
        unread(draft, entry, DATASET_LEFT_OUT)
    rows.only_text = all(texts)
    return rows


def _row(draft: Draft, entry: Keys, rows: Rows) -> dict[str, Any]:
    """Fields of a source of conversations or texts."""
    where = entry.where
    if isinstance(entry.values.get("type"), dict):
        return _own_format(draft, entry)
    default = "pretrain" if where.startswith("pretraining_dataset") else "chat_template"
    kind = entry.take("type", str, default)
    base = kind.replace(":", ".").partition(".")[0]
    if base not in TYPES:
        draft.differs(f"{where}type: {kind}", "the rows are read by their columns (docs/data.md lists what is known)")
        return {}
    columns, rename = TYPES[base]
    rename = dict(TURNED.get(kind, rename))
    if base in ("completion", "pretrain"):
        column = entry.take("field", str) or entry.take("text_column", str, "text")
        return {"rename": {column: "text"} if column != "text" else {}, "text": True}
    if base == "sharegpt":
        draft.broken(f"{where}type: {kind}", "Axolotl refuses it; chat_template with field_messages came in its place")
    elif base != "chat_template":
        draft.differs(f"{where}type: {kind}", OWN_TEXT)
    if base == "chat_template":
        columns, rename = _conversation(draft, entry, rows)
    if conversation := entry.take("conversation", str):
        rows.template = rows.template or conversation
    return {"columns": columns if columns != "smoltalk2" else None, "rename": rename, "roles": _roles(entry)}


def _conversation(draft: Draft, entry: Keys, rows: Rows) -> tuple[str, dict[str, str]]:
    """Columns and renamed columns of a dataset of turns, and what it says of templates and masks."""
    where = entry.where
    template = entry.take("chat_template", str)
    if template and template != "tokenizer_default":
        rows.template = template
    if entry.take("chat_template_jinja", str):
        draft.differs(f"{where}chat_template_jinja", "a stage has one template; set its template to a .jinja file")
    role, content = _mapping(entry)
    messages = entry.take("field_messages", str, "messages")
    columns = {("role", "content"): "smoltalk2", ("from", "value"): "sharegpt"}.get((role, content))
    if columns is None:
        draft.differs(
            f"{where}message_property_mappings", f"turns of {role} and {content} are refused; rename them in the rows"
        )
    columns = columns or "smoltalk2"
    target = "conversations" if columns == "sharegpt" else "messages"
    rename = {messages: target} if messages not in ("messages", "conversations") else {}
    tools = entry.take("field_tools", str, "tools")
    if tools != "tools":
        rename[tools] = "tools"
    _masks(draft, entry, rows)
    for name, ours in (("field_thinking", "reasoning_content"), ("message_field_training", "train")):
        if (said := entry.take(name, str)) and said not in (ours, "training", "reasoning", "thinking"):
            draft.differs(f"{where}{name}: {said}", f"turns have it as {ours}; rename it in the rows")
    for name in ("message_field_training_detail", "template_thinking_key", "split_thinking", "drop_system_message"):
        if entry.values.get(name):
            entry.read.add(name)
            draft.differs(f"{where}{name}", "it is not read")
    return columns, rename


def _mapping(entry: Keys) -> tuple[str, str]:
    """The names that a turn has for role and content."""
    mapping = entry.take("message_property_mappings", dict, {})
    role = entry.take("message_field_role", str) or mapping.get("role", "role")
    return str(role), str(entry.take("message_field_content", str) or mapping.get("content", "content"))


def _masks(draft: Draft, entry: Keys, rows: Rows) -> None:
    where = entry.where
    trained = [str(role) for role in entry.take("roles_to_train", list, [])]
    if trained:
        known = {"gpt": "assistant", "human": "user", "model": "assistant"}
        own = [known.get(role, role) for role in trained]
        if rows.roles_said and own != rows.train_roles:
            draft.differs(f"{where}roles_to_train", f"a stage has one list for all sources: {rows.train_roles}")
        else:
            rows.train_roles, rows.roles_said = own, True
    eos = entry.take("train_on_eos", str, "turn")
    if eos != "turn":
        draft.differs(
            f"{where}train_on_eos: {eos}", "each trained turn trains with its stop token, and no other turn's"
        )
    elif entry.given("train_on_eos"):
        draft.left_out(f"{where}train_on_eos", "each trained turn trains with its stop token, as here")


def _roles(entry: Keys) -> dict[str, str]:
    """`roles`, the other way round: role of the rows -> ours."""
    stated = entry.take("roles", dict, {})
    known = {"human": "user", "gpt": "assistant"}
    pairs = {str(theirs): str(ours) for ours, names in stated.items() for theirs in (names or [])}
    return {theirs: ours for theirs, ours in pairs.items() if theirs != ours and known.get(theirs) != ours}


def _own_format(draft: Draft, entry: Keys) -> dict[str, Any]:
    """A type that is a mapping: columns, and a text with places for them."""
    kind = Keys(entry.take("type", dict), draft.file, f"{entry.where}type.")
    names = {"instruction": "instruction", "input": "input", "output": "output", "system": "system"}
    rename = {kind.take(f"field_{theirs}", str, theirs): ours for theirs, ours in names.items()}
    for name in kind.unread():
        kind.read.add(name)
        draft.differs(f"{kind.where}{name}", OWN_TEXT)
    return {"columns": "alpaca", "rename": {theirs: ours for theirs, ours in rename.items() if theirs != ours}}


def _pair(draft: Draft, entry: Keys, rows: Rows) -> dict[str, Any]:
    """Fields of a source of pairs."""
    where = entry.where
    if isinstance(entry.values.get("type"), dict):
        kind = Keys(entry.take("type", dict), draft.file, f"{where}type.")
        rename = {kind.take(f"field_{name}", str, name): name for name in PAIR_COLUMNS}
        for name in kind.unread():
            draft.differs(f"{kind.where}{name}", OWN_TEXT)
        return {"rename": {theirs: ours for theirs, ours in rename.items() if theirs != ours}}
    kind = entry.take("type", str, "chat_template.default")
    family, _, shape = kind.partition(".")
    shape = shape or "default"
    if shape not in PAIR_TYPES:
        draft.differs(f"{where}type: {kind}", "the rows are read by their columns (docs/data.md lists what is known)")
        return {}
    rename = dict(PAIR_TYPES[shape])
    if family == "chat_template":
        template = entry.take("chat_template", str)
        rows.template = template if template and template != "tokenizer_default" else rows.template
        if shape == "default":
            rename[entry.take("field_messages", str, "messages")] = "prompt"
        for side in ("chosen", "rejected"):
            if (column := entry.take(f"field_{side}", str, side)) != side:
                rename[column] = side
        role, content = _mapping(entry)
        if (role, content) != ("role", "content"):
            what = f"turns of {role} and {content} are refused; rename them in the rows"
            draft.differs(f"{where}message_property_mappings", what)
    else:
        rows.template = rows.template or family
    rename = {theirs: ours for theirs, ours in rename.items() if theirs != ours}
    return {"rename": rename, "roles": _roles(entry)}
