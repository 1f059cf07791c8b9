"""The text of a reply while its tokens come."""

from collections.abc import Collection, Iterable

from transformers import PreTrainedTokenizerBase

from smolpost.inference.generation import silent_tokens

MOST_OF_A_CHARACTER = 4  # tokens: one for each byte
BROKEN = "\ufffd"  # how a part of a character decodes


class TextStream:
    """Turns tokens into text, piece by piece.

    The pieces together are `reply_text` of all tokens, unless these hold bytes that are not UTF-8. A character whose
    bytes are spread over several tokens comes with the last of them.

    Args:
        stop_tokens: As for `reply_text`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_tokens: Collection[int]):
        self._tokenizer, self._silent = tokenizer, silent_tokens(tokenizer, stop_tokens)
        # Decoded together with the new ones: some decoders drop the blank before the first token they are given.
        self._before: list[int] = []
        self._new: list[int] = []

    def text(self, tokens: Iterable[int]) -> str:
        """The text that these tokens add; "" while a character is not complete."""
        return "".join(self._added(token) for token in tokens if token not in self._silent)

    def _added(self, token: int) -> str:
        self._new.append(token)
        piece = self._piece()
        if piece.endswith(BROKEN) and len(self._new) < MOST_OF_A_CHARACTER:
            return ""
        self._take()
        return piece

    def rest(self) -> str:
        """What was held back, at the end of a reply."""
        piece = self._piece() if self._new else ""
        self._take()
        return piece

    def _piece(self) -> str:
        return self._decoded(self._before + self._new)[len(self._decoded(self._before)) :]

    def _take(self) -> None:
        self._before, self._new = (self._new or self._before)[-MOST_OF_A_CHARACTER:], []

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
