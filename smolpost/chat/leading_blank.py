"""Tokenizers that put a blank before a text, as Llama 2's and Mistral's do.

A piece of a conversation that continues a text must not get that blank: at inference the text is tokenized in one go.
"""

import json
from typing import Any, NamedTuple

from tokenizers import Tokenizer

_PARTS = ("normalizer", "pre_tokenizer")


class LeadingBlank(NamedTuple):
    """
    Attributes:
        usual, plain: Copies of the tokenizer that put no blank before a text; `plain` matches no added token.
        everywhere: The tokenizer itself puts one before the text after every added token, not only before the first.
    """

    usual: Tokenizer
    plain: Tokenizer
    everywhere: bool


def leading_blank(usual: Tokenizer, plain: Tokenizer) -> LeadingBlank | None:
    """None for a tokenizer that puts no blank before a text.

    Args:
        usual, plain: The tokenizer, and a copy of it that matches no added token.
    """
    found: list[str] = []
    for name in _PARTS:
        if (part := getattr(usual, name)) is not None:
            _without(json.loads(part.__getstate__()), found)
    if not found:
        return None
    copies = [_copy(usual), _copy(plain)]
    copies[1].encode_special_tokens = True
    return LeadingBlank(*copies, everywhere=found != ["first"])


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    state = json.loads(tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(state | {name: _without(state[name], []) for name in _PARTS}))


def _without(part: Any, found: list[str]) -> Any:
    """A part of a tokenizer's state without what puts a blank before a text; `found` gets when each of these does."""
    if isinstance(part, list):
        return [one for one in (_without(p, found) for p in part) if one is not None]
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "Sequence":
        return {key: _without(value, found) for key, value in part.items()}
    if kind == "Prepend":
        found.append("always")
        return None
    if kind == "Metaspace" and part["prepend_scheme"] != "never":
        found.append(part["prepend_scheme"])
        return part | {"prepend_scheme": "never"}
    if kind == "ByteLevel" and part["add_prefix_space"]:
        found.append("always")
        return part | {"add_prefix_space": False}
    return part
