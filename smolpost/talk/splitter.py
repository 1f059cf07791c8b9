"""Tells thinking from answer while a reply streams."""

from collections.abc import Iterator

from smolpost.chat.reasoning import CLOSE, OPEN

THINKING, ANSWER = "thinking", "answer"
Piece = tuple[str, str]  # THINKING or ANSWER, and a text


class Splitter:
    """The text of a reply, piece by piece, as THINKING and ANSWER.

    `split_reasoning` of the complete reply decides. It can read a lone or an unusual `</think>` in another way than a
    reader of the begin could.

    Args:
        opened: The prompt ended inside a think block.
    """

    def __init__(self, *, opened: bool = False):
        self._opened, self._text = opened, ""
        self._place = 0  # what is before it was given out
        self._inner = 0  # where the text of the think block at work begins
        self._state = THINKING if opened else None  # None: before a think block or the answer

    def add(self, text: str) -> Iterator[Piece]:
        """What can be told now; the start of a tag is held back."""
        self._text += text
        yield from self._pieces(ended=False)

    def end(self) -> Iterator[Piece]:
        """What was held back."""
        yield from self._pieces(ended=True)

    def _pieces(self, *, ended: bool) -> Iterator[Piece]:
        if self._state is None and not self._begin(ended):
            return
        if self._state == ANSWER:
            if self._place < len(self._text):
                yield ANSWER, self._text[self._place :]
                self._place = len(self._text)
            return
        stop, closes = self._end_of_block(ended)
        if stop > self._place:
            yield THINKING, self._text[self._place : stop]
            self._place = stop
        if closes:
            self._place, self._state = stop + len(CLOSE), None
            yield from self._pieces(ended=ended)

    def _begin(self, ended: bool) -> bool:
        """Whether it can be told what begins here."""
        rest = self._text[self._place :]
        start = rest.lstrip()
        if start.startswith(OPEN):
            self._place = self._inner = len(self._text) - len(start) + len(OPEN)
            self._state = THINKING
        elif start and (ended or not OPEN.startswith(start)):
            self._place += len(rest) - len(rest.lstrip("\r\n"))
            self._state = ANSWER
        return self._state is not None

    def _end_of_block(self, ended: bool) -> tuple[int, bool]:
        """How far the text is surely thinking, and whether a tag that ends the block begins there.

        As in `chat.reasoning`: the tag ends a block of one line anywhere, and a longer one at the edge of a line.
        """
        place = self._text.find(CLOSE, self._place)
        while place >= 0:
            after = self._text[place + len(CLOSE) :].lstrip(" \t")
            line = self._text.rfind("\n", self._inner, place)
            if line < 0 or not self._text[line:place].strip() or after.startswith(("\n", "\r\n")):
                return place, True
            if not after.strip("\r"):  # a line break may follow
                return place, ended
            place = self._text.find(CLOSE, place + len(CLOSE))
        held = 0 if ended else next((n for n in range(len(CLOSE) - 1, 0, -1) if self._text.endswith(CLOSE[:n])), 0)
        return max(self._place, len(self._text) - held), False
