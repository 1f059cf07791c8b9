"""The control token that ends a reply: which one a template writes, and whether generation stops at it."""

from pathlib import Path
from typing import TYPE_CHECKING

from smolpost.chat.fates import Fate
from smolpost.chat.masks import encode
from smolpost.errors import UserError
from smolpost.schema import RELEASE_DAY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]


def control_token(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> int | None:
    """Id of the control token that ids end with, blanks after it left out; None where they end otherwise."""
    added = tokenizer.added_tokens_decoder
    for i in reversed(ids):
        if i in added and added[i].content.strip():
            return i
        if not is_blank(tokenizer, i):
            return None
    return None


def is_blank(tokenizer: "PreTrainedTokenizerBase", token: int) -> bool:
    """Whether a token stands for white space only, such as the line break after a stop token."""
    return not tokenizer.decode([token], clean_up_tokenization_spaces=False).strip()


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Id of the control token that ends a reply under the tokenizer's chat template, as training would train it.

    None where there is no template, it refuses a question with its answer, or it ends a reply with plain text.
    """
    try:
        encoded = encode(tokenizer, PROBE, today=RELEASE_DAY)
    except (UserError, ValueError):  # the library's own error where there are several templates and none is the default
        return None
    pairs = zip(encoded.input_ids, encoded.fates, strict=True)
    return control_token(tokenizer, [i for i, fate in pairs if fate == Fate.TRAINED])


def endless_replies(tokenizer: "PreTrainedTokenizerBase", stop_tokens: list[int], place: str | Path) -> str:
    """What to change where generation does not stop at the end of the template's replies; "" where it does.

    Args:
        stop_tokens: Ids at which the checkpoint's generation stops.
        place: Folder or name of the checkpoint, for the sentence.
    """
    end = turn_end(tokenizer)
    if end is None or end in stop_tokens:
        return ""
    stops = ", ".join(map(str, tokenizer.convert_ids_to_tokens(list(stop_tokens)))) or "no token"
    return (
        f"{place} stops at {stops} and not at {tokenizer.convert_ids_to_tokens(end)}, which ends a reply in its chat "
        f"template: replies run on to their longest length; set eos_token_id to {[end, *stop_tokens]} in its "
        "generation_config.json, and where it was adopted, delete its manifest.json and adopt it again"
    )
