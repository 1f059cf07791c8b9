"""Tokenizers for miniatures: SmolLM3's special tokens and a small vocabulary learned from given texts."""

import string
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smolpost.chat.render import load_template
from smolpost.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BOS, _END, _PAD, _UNK = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<unk>"
_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"

# In the order of the released vocabulary.
_BLOCKS = ("<tool_response>", "</tool_response>", "<tool_call>", "</tool_call>", "<code>", "</code>")
_SPECIAL_TOKENS = (_BOS, _END, "<think>", "</think>", _PAD, _TURN_START, _TURN_END, *_BLOCKS)
# skip_special_tokens drops only these: readers and parsers need the reasoning and calls of a reply.
_SKIPPED = {_BOS, _END, _PAD, _TURN_START, _TURN_END}

_ROLES = ("system", "user", "assistant", "tool")


def build_tokenizer(
    texts: Iterable[str], *, kind: str, vocab_size: int, template: str | Path
) -> PreTrainedTokenizerFast:
    """A small tokenizer that behaves like SmolLM3's: same special tokens, stop and padding token, no bos added.

    The same texts give a byte-identical `tokenizer.json`. Decoding an encoded text gives the text back.

    Args:
        texts: Strings from which the vocabulary is learned.
        kind: "bpe": byte-level BPE for any text. "char": one token for each character of the texts and of printable
            ASCII, and one for each role word; other characters become `<unk>` (see `check_covers`).
        vocab_size: Target number of tokens, added tokens included; small texts give fewer.
        template: Name or path of the chat template, as in `load_template`.
    Returns:
        A PreTrainedTokenizerFast; after `save_pretrained`, stock AutoTokenizer loads it.
    Raises:
        UserError: The kind or the template is unknown, or vocab_size is below the alphabet.
    """
    build = {"bpe": _byte_level_bpe, "char": _characters}.get(kind)
    if build is None:
        raise UserError(f"tokenizer kind {kind!r} is unknown; use bpe or char")
    chat_template = load_template(template)
    tokenizer = build(texts, vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_TURN_END,
        pad_token=_PAD,
        unk_token=_UNK if kind == "char" else None,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def check_covers(tokenizer: "PreTrainedTokenizerBase", text: str) -> None:
    """Refuse text that the tokenizer can encode only with its unknown token.

    Raises:
        UserError: Names the first character that has no token.
    """
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in tokenizer.encode(text, add_special_tokens=False):
        return
    vocabulary = tokenizer.get_vocab()
    for character in text:
        if character not in vocabulary:
            raise UserError(
                f"character {character!r} (U+{ord(character):04X}) has no token; "
                "build the tokenizer on texts that contain it, or with kind bpe"
            )


def _byte_level_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    num_added = len(_SPECIAL_TOKENS)
    _check_vocab_size(vocab_size, "bpe", len(alphabet) + num_added)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Sorted: the alphabet is a set, whose order changes between processes.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - num_added, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(_added_tokens())
    return tokenizer


def _characters(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    alphabet = {character for text in texts for character in text} | set(string.printable)
    _check_vocab_size(vocab_size, "char", len(alphabet) + 1 + len(_ROLES) + len(_SPECIAL_TOKENS))
    vocabulary = {token: i for i, token in enumerate([_UNK, *sorted(alphabet)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNK))
    # [\s\S] and not a dot, because a dot does not match line breaks.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([*(AddedToken(role, normalized=False) for role in _ROLES), *_added_tokens()])
    return tokenizer


def _added_tokens() -> list[AddedToken]:
    return [AddedToken(token, special=token in _SKIPPED, normalized=False) for token in _SPECIAL_TOKENS]


def _check_vocab_size(vocab_size: int, kind: str, smallest: int) -> None:
    if vocab_size < smallest:
        raise UserError(f"vocab_size={vocab_size} is below the {smallest} tokens that kind {kind} needs; raise it")
