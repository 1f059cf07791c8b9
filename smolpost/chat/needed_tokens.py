"""Control tokens that a chat template writes and that a tokenizer does not have.

A tag such as <|im_start|> that is not one token is spelt in several ordinary tokens. A model can learn that, but badly.
"""

import re
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

from smolpost.chat.controls import STRUCTURE
from smolpost.chat.render import load_template, render
from smolpost.chat.turn_end import stop_token
from smolpost.errors import UserError
from smolpost.schema import RELEASE_DAY
from smolpost.screen import command_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# <|im_start|>, <|turn>, <start_of_turn>, </think>, [INST]; some templates write the bar as a full-width one.
_TAG = re.compile(r"<[|｜][^<>\s]+>|<[^<>\s]+[|｜]>|</?[A-Za-z_]\w*>|\[/?[A-Z][A-Z_]*\]")
_SYSTEM = {"role": "system", "content": "Hello."}
_TURNS = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Hello?"},
]
_MODES = ({}, {"enable_thinking": True}, {"enable_thinking": False})


def lacking(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[str]:
    """The control tokens that a template writes into every chat and that are not one token of the tokenizer.

    They are looked for in renderings of a chat without tags of its own, in each think mode, with the prompt of the next
    reply. What a template writes only beside tools or reasoning does not count, nor does the name of a placeholder.

    Args:
        tokenizer: Its own chat template is not used.
        template: Text of the chat template.
    Returns:
        The tokens in the order of the text, each once.
    """
    return split_tokens(tokenizer, _written(tokenizer, template))


def check_tokens(tokenizer: "PreTrainedTokenizerBase", name: str | Path, key: str, place: str | Path) -> None:
    """Refuse a template of which the tokenizer lacks control tokens, unless it is the tokenizer's own template.

    Some models spell the tags of their own template in several tokens, and know them so.

    Args:
        name: The template, as `load_template` takes it.
        key: The stage in messages.
        place: Folder or name of the checkpoint.
    Raises:
        UserError: Names the tokens and the command that adds them.
    """
    template = load_template(name)
    if tokenizer.chat_template == template or not (missing := lacking(tokenizer, template)):
        return
    command = command_line(["smolpost", "add-tokens", place, "OUT", "--template", name])
    stops = stop_token(speaking(tokenizer, template)) is not None
    or_spelt = f", or set {key}.allow_split_tokens=true to train them as ordinary text" if stops else ""
    raise UserError(
        f"{key}.template={name} writes {', '.join(missing)}, for which the tokenizer of {place} has no token; "
        f"`{command}` writes a checkpoint that has them, for model.checkpoint=OUT{or_spelt}"
    )


def addable(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[str]:
    """`lacking`, and the tags of think blocks and tool calls that the template knows and that are not one token."""
    known = [tag for tag in STRUCTURE if tag in template]
    return split_tokens(tokenizer, [*_written(tokenizer, template), *known])


def _written(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[str]:
    """The tags of the template's own that are in renderings of the probe; none if it refuses the probe."""
    found, tokenizer = [], speaking(tokenizer, template)
    for messages in (_TURNS, [_SYSTEM, *_TURNS]):
        for mode in _MODES:
            options = {"template_kwargs": mode, "today": RELEASE_DAY, "add_generation_prompt": True}
            try:
                found += _TAG.findall(render(tokenizer, messages, **options))
            except UserError:  # it refuses this chat; rows that it refuses say so themselves
                continue
    return found


def speaking(tokenizer: "PreTrainedTokenizerBase", template: str) -> "PreTrainedTokenizerBase":
    """The tokenizer with another chat template; the given one stays as it is."""
    tokenizer = copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def split_tokens(tokenizer: "PreTrainedTokenizerBase", tags: list[str]) -> list[str]:
    """The tags that are more than one token or only the unknown one, each once."""

    def is_token(tag: str) -> bool:
        ids = tokenizer.encode(tag, add_special_tokens=False)
        return len(ids) == 1 and ids[0] != tokenizer.unk_token_id

    return [tag for tag in dict.fromkeys(tags) if not is_token(tag)]
