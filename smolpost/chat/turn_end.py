"""The control token with which a template ends a reply, and whether generation stops at it."""

from pathlib import Path
from typing import TYPE_CHECKING

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode
from smolpost.errors import UserError
from smolpost.schema import RELEASE_DAY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]


def _control_token(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> int | None:
    """Id of the control token at the end of ids, before trailing blanks; None if there is none."""
    added = tokenizer.added_tokens_decoder
    for i in reversed(ids):
        if i in added and added[i].content.strip():
            return i
        if not is_blank(tokenizer, i):
            return None
    return None


def is_blank(tokenizer: "PreTrainedTokenizerBase", token: int) -> bool:
    """Whether a token is only white space, such as the line break after a stop token."""
    return not tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()


def stop_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Id of the control token that would train as the end of a reply, under the tokenizer's chat template.

    None if there is no template, or it refuses a question and an answer, or it ends a reply with plain text.
    """
    try:
        encoded = encode(tokenizer, PROBE, today=RELEASE_DAY)
    except (UserError, ValueError):  # transformers raises it if there are several templates and none is the default
        return None
    pairs = zip(encoded.input_ids, encoded.fates, strict=True)
    return _control_token(tokenizer, [i for i, fate in pairs if fate == Fate.TRAINED])


def endless_replies(tokenizer: "PreTrainedTokenizerBase", stop_tokens: list[int], place: str | Path) -> str:
    """A sentence about what to change if generation does not stop at the end of the template's replies, else "".

    Args:
        stop_tokens: Ids at which the checkpoint's generation stops.
        place: Folder or name of the checkpoint.
    """
    end = stop_token(tokenizer)
    if end is None or end in stop_tokens:
        return ""
    stops = ", ".join(map(str, tokenizer.convert_ids_to_tokens(list(stop_tokens)))) or "no token"
    return (
        f"{place} stops at {stops} and not at {tokenizer.convert_ids_to_tokens(end)}, which ends a reply in its chat "
        f"template: every reply runs to its maximum length; set eos_token_id to {[end, *stop_tokens]} in its "
        "generation_config.json; if it was adopted, also delete its manifest.json and adopt it again"
    )
