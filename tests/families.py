"""Tokenizers of other families than SmolLM3's: byte-level BPE, as GPT-2's is, with the tokens a test gives them."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from smolpost.chat.render import load_template


def byte_level(*special: str, added: tuple[str, ...] = (), template: str = load_template("smollm3")):
    """A token per byte, ChatML's two, and the given ones.

    Args:
        special: Further special tokens.
        added: Ordinary added tokens.
        template: Text of the chat template.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>", *special])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=template)
