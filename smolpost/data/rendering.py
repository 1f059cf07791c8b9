"""Compares rows with their renderings: a difference is a fault of the row, or a note in the ledger.

A reply that would train without its call, text or reasoning is refused. Parts that a template may leave out by design,
and think modes that no row states, are noted.
"""

from smolpost.chat.masks import Encoded, EncodedPair
from smolpost.chat.shown import Modes, Omission, modes_of
from smolpost.data.prompts import stated_mode
from smolpost.data.rows import Row
from smolpost.data.settings import Rows

#: Kind of omission in a reply that trains -> the message; {} is a few words of what is lost.
REFUSED = {
    "call": "leaves the call of {} out of the reply, which would train without it; use a template that writes "
    "tool_calls, such as smollm3",
    "all": "makes an empty reply of {}; use another template, or delete the row",
    "text": "leaves {} out of the reply, which would train without it; use another template",
    "reasoning": "leaves the reasoning {} out of the reply, which would train without it; use a template that writes "
    "reasoning, such as smollm3, or set enable_thinking: false of the source if the reasoning should not train",
}
#: Note -> what is said of the rows that have it, after their number.
NOTES = {
    "mode": "do not state their mode and have no think block, so they train as replies in think mode; set "
    "enable_thinking: false of the source, mode_from_reply: true where other rows of it think, or each row's own in "
    "chat_template_kwargs",
    "no mode": "say enable_thinking: false, which the chat template does not read, so nothing in them asks for "
    "no-think; use a template with both modes, such as smollm3, if the model should have them",
    "no-think reasoning": "have reasoning that is left out because they say enable_thinking: false",
    "earlier reasoning": "train replies whose reasoning the chat template leaves out because other replies follow",
    "text beside calls": "have replies whose text the chat template leaves out beside their calls",
    "system": "have a system message that the chat template leaves out",
    "user": "have a user turn that the chat template leaves out",
    "tool results": "have a tool result that the chat template leaves out",
    "tools": "have tools that the chat template does not list",
}


def fault_of(row: Row, lost: tuple[Omission, ...]) -> str | None:
    """Why the row cannot train as it is rendered."""
    for omission in lost:
        if omission.kind in REFUSED and _note_of(row, omission) is None:
            said = REFUSED[omission.kind].format(repr(" ".join(omission.what.split())[:40]))
            return f"{row.where}: messages[{omission.message}]: the chat template {said}"
    return None


def notes_of(row: Row, encoded: Encoded | EncodedPair, modes: Modes | None) -> tuple[str, ...]:
    """The notes on a row's rendering, keys of NOTES.

    Args:
        modes: Of the chat template (`trained_modes`).
    """
    noted = dict.fromkeys(filter(None, (_note_of(row, omission) for omission in encoded.lost)))
    if modes and modes.thinks_unasked and not encoded.thinks and stated_mode(row) is None:
        noted["mode"] = None
    asks = (row.get("chat_template_kwargs") or {}).get("enable_thinking")
    if modes and not modes.two and asks is False and "no-think reasoning" not in noted:
        noted["no mode"] = None
    return tuple(noted)


def trained_modes(tokenizer, stage: Rows) -> Modes | None:
    """The modes of the chat template, as far as the stage trains them; None without reasoning."""
    return modes_of(tokenizer, stage.today) if stage.train_reasoning else None


def _note_of(row: Row, omission: Omission) -> str | None:
    """The note for an omission; None if it refuses the row."""
    if omission.kind in ("reasoning", "earlier reasoning") and stated_mode(row) is False:
        return "no-think reasoning"
    return omission.kind if omission.kind in NOTES else None
