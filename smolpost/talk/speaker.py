"""What answers in a chat: a model in this process or behind a server."""

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from smolpost.talk.conversation import Conversation, Said
from smolpost.talk.settings import Settings
from smolpost.talk.splitter import THINKING, Piece

# Takes THINKING or ANSWER, the text that is new, and the counts so far.
Show = Callable[[str, str, "Heard"], object]


class Speaker(Protocol):
    """
    Attributes:
        name: For people, and for the source of saved rows.
        about: A line about the model.
        settings: The sampling that the model's files ask for; None where that is not known.
    """

    name: str
    about: str
    settings: Settings | None

    def mode(self, conversation: Conversation, wanted: bool | None) -> bool | None:
        """Whether the next reply is to think; None where a user cannot choose, or has not and the server decides.

        Args:
            wanted: By the user; None: as the template decides.
        """

    def reply(self, conversation: Conversation, settings: Settings, wanted: bool | None, seed: int, show: Show) -> Said:
        """The next reply of a conversation that waits for one. Ctrl-C ends it, and what came so far is returned.

        Raises:
            UserError: There is none: the conversation is too long, or the server does not answer.
        """


class Heard:
    """Shows the pieces of a reply, and counts tokens and seconds."""

    def __init__(self, show: Show):
        self.show, self.began = show, time.monotonic()
        self.num_tokens = self.thinking_tokens = 0
        self.thinking_seconds = 0.0

    def take(self, pieces: Iterable[Piece], num_tokens: int) -> None:
        """Pieces that came with so many tokens."""
        self.num_tokens += num_tokens
        for kind, text in pieces:
            if kind == THINKING:
                self.thinking_tokens = self.num_tokens
                self.thinking_seconds = self.seconds
            self.show(kind, text, self)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def cut_at(most: int) -> str:
    """What to say of a reply that reached its longest length."""
    return f"cut at {most:,} tokens; /set max_new_tokens={2 * most} and /retry allow more"
