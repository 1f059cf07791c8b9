"""The keys of rows and messages: which are read, which are refused, and which are only counted.

A key that changes what a row means is followed or refused by name. Every other unknown key is counted in the ledger.
A key without content (null, "", [], {}) means nothing.
"""

from smolpost.errors import UserError

#: Keys of a row in our columns. Each shape's own columns have become these (`columns.py`).
ROW = {
    "messages", "completion_turns", "chosen", "rejected", "prompt", "text", "tools", "chat_template_kwargs", "source",
}  # fmt: skip
#: Keys of a message in our columns (`turns.py`).
MESSAGE = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "train"}
CALL = {"id", "type", "function"}
FUNCTION = {"name", "arguments"}

_MEDIA = dict.fromkeys(
    ("images", "image", "videos", "video", "audios", "audio"), "only text can be trained on; delete the row"
)
_OTHER_REASONING = "reasoning is read from reasoning_content, reasoning or thinking; write it there"
REFUSED_IN_ROWS = {
    **_MEDIA,
    **dict.fromkeys(
        ("assistant_masks", "completion_mask"),
        "it marks tokens of another tokenization; mark turns with train: false instead, and remove the column",
    ),
}
REFUSED_IN_MESSAGES = {
    **_MEDIA,
    **dict.fromkeys(
        ("train_detail", "training_detail"),
        "parts of a turn cannot be left out; mark the whole turn with train, or split it",
    ),
    **dict.fromkeys(("mask", "loss_scale"), "a turn trains or is left out; mark it with train: true or train: false"),
    **dict.fromkeys(("thought", "thoughts", "think", "reasoning_details"), _OTHER_REASONING),
    "channel": "turns have no channels; write analysis as reasoning_content of the turn that answers",
    "parts": "the text of a turn is read from content; write it there",
}
#: Marks of other tools that say whether a turn trains: ours, Axolotl's, OpenAI's, ms-swift's, LLaMA-Factory's forks'.
MARKS = ("train", "training", "trainable", "loss", "loss_mask", "weight")
#: Marks of a row that hold True where its reply is a desired one (TRL, LLaMA-Factory).
DESIRED = ("label", "kto_tag")


def is_empty(value) -> bool:
    """Whether a value has no content: null, "", [] or {}."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def refuse(content: dict, refused: dict[str, str], where: str) -> None:
    """
    Raises:
        UserError: A refused key has content.
    """
    for key in content.keys() & refused.keys():
        if not is_empty(content[key]):
            raise UserError(f"{where}: {key}={content[key]!r:.60} would be lost: {refused[key]}")


def mark_of(content: dict, keys: tuple[str, ...], where: str, says: str = "the turn trains") -> bool | None:
    """What the marks say, true or false; None without a mark.

    Args:
        says: What a true mark says, for the message.
    Raises:
        UserError: A mark is not true, false, 1 or 0, or two marks disagree.
    """
    marks = {key: content[key] for key in keys if key in content}
    for key, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"{where}: {key}={value!r:.60} is not a mark; expected true, false, 1 or 0; rewrite it")
    if len(set(map(bool, marks.values()))) > 1:
        stated = ", ".join(f"{key}={value}" for key, value in marks.items())
        raise UserError(f"{where}: {stated} disagree on whether {says}; keep one of them")
    return bool(next(iter(marks.values()))) if marks else None
