"""How a chat looks: in a terminal, with one reply below the other or two side by side; and through a pipe."""

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from smolpost.talk.conversation import STOP, Said
from smolpost.talk.speaker import Heard
from smolpost.talk.splitter import THINKING

WIDE = 100  # characters from which two replies stand side by side
WINDOW = 8  # lines of thinking that are seen while it streams
REDRAW = 0.1  # seconds between two looks of what is redrawn
GAP = 3  # characters between columns
DIM = "dim"
# A reply must not move the cursor or set the terminal's title.
_CONTROLS = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"} | {ord("\r"): None}


def clean(text: str) -> str:
    """The text without control characters, for a terminal."""
    return text.translate(_CONTROLS)


def thought_line(tokens: int, seconds: float, *, ended: bool = True) -> str:
    """What stands in place of folded thinking."""
    return f"thought for {tokens:,} tokens, {seconds:.1f} s{'' if ended else ', without an end'}; /unfold shows it"


def speed_line(said: Said) -> str:
    """The last line of a reply."""
    speed = f", {said.num_tokens / said.seconds:.1f} tokens/s" if said.seconds > 0 else ""
    unit = "token" if said.num_tokens == 1 else "tokens"
    return f"{said.num_tokens:,} {unit}{speed}, seed {said.seed}"


def foot_lines(said: Said, calls: Sequence[str]) -> list[str]:
    """What is said below a reply: its calls, how it ended, its speed."""
    lines = [f"calls {clean(call)}" for call in calls]
    if said.finish != STOP:
        lines.append(said.note or "stopped by ctrl-C; it stays in the conversation, and /retry asks again")
    return [*lines, speed_line(said)]


class Turn(ABC):
    """The replies of all speakers to one prompt."""

    @abstractmethod
    def show(self, place: int, kind: str, text: str, heard: Heard) -> None:
        """New text of a speaker's reply; arguments as `speaker.Show`, after the speaker's place."""

    @abstractmethod
    def end(self, place: int, said: Said | None, lines: list[str]) -> None:
        """The reply as it is kept, None where there is none, and what stands below it."""


class View(ABC):
    """
    Attributes:
        unfolded: Thinking stays to be read.
        interactive: A user is told what is wrong and goes on; otherwise the first error ends the chat.
    """

    unfolded = False
    interactive = True

    @abstractmethod
    def read(self, prompt: str) -> str | None:
        """What the user says next; None at the end."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Something that is not a reply."""

    @abstractmethod
    def turn(self, names: Sequence[str]) -> contextlib.AbstractContextManager[Turn]:
        """Show replies of these speakers."""


# ---------------------------------------------------------------- through a pipe


class Plain(View):
    """Prompts and commands from the lines of stdin; answers alone go to stdout, all else to stderr."""

    interactive = False

    def read(self, prompt: str) -> str | None:
        parts = []
        for line in sys.stdin:
            parts.append(line.rstrip("\r\n"))
            if not parts[-1].endswith("\\"):
                return "\n".join(parts)
            parts[-1] = parts[-1][:-1]
        return "\n".join(parts) if parts else None

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def turn(self, names: Sequence[str]) -> Iterator[Turn]:
        yield _PlainTurn(self, names)


class _PlainTurn(Turn):
    def __init__(self, view: Plain, names: Sequence[str]):
        self.view, self.names = view, names

    def show(self, place: int, kind: str, text: str, heard: Heard) -> None:
        pass

    def end(self, place: int, said: Said | None, lines: list[str]) -> None:
        if said is None:
            return
        name = f"{self.names[place]}: " if len(self.names) > 1 else ""
        thinking = f"{said.message['content'][: -len(said.answer) or None]}" if self.view.unfolded else ""
        print(f"{name}{thinking}{said.answer}", flush=True)
        for line in lines[:-1]:  # the last one is the speed
            self.view.note(f"{name}{line}")


# ---------------------------------------------------------------- in a terminal


class Terminal(View):
    def __init__(self, console: Console):
        import readline  # gives `input` its history and its keys

        readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text is one message, with its line breaks
        self.console = console

    def read(self, prompt: str) -> str | None:
        parts = []
        try:
            while not parts or parts[-1].endswith("\\"):
                parts = [part.removesuffix("\\") for part in parts]
                parts.append(input("... " if parts else prompt))
        except EOFError:
            self.console.print()
            return None
        return "\n".join(parts)

    def note(self, text: str) -> None:
        self.console.print(Text(clean(text), style=DIM), soft_wrap=True)

    @contextlib.contextmanager
    def turn(self, names: Sequence[str]) -> Iterator[Turn]:
        if len(names) > 1 and self.console.width >= WIDE and not self.console.is_dumb_terminal:
            turn = _Columns(self, names)
        else:
            turn = _Stacked(self, names)
        try:
            yield turn
        finally:
            turn.close()


class _Stacked(Turn):
    """Replies one below the other, written as they come; folded thinking is seen in a window that closes behind it."""

    def __init__(self, view: Terminal, names: Sequence[str]):
        self.view, self.console, self.names = view, view.console, names
        self.live: Live | None = None
        self._begin()

    def _begin(self) -> None:
        self.thinking, self.answer, self.is_named = "", "", False
        self.last_look = 0.0

    def show(self, place: int, kind: str, text: str, heard: Heard) -> None:
        self._name(place)
        if kind == THINKING:
            text = text if self.thinking else text.lstrip("\r\n")
            self.thinking += text
            self._think(clean(text))
            return
        if not self.answer:
            self._fold(heard.thinking_tokens, heard.thinking_seconds, ended=True)
        self.answer += text
        self._write(clean(text))

    def end(self, place: int, said: Said | None, lines: list[str]) -> None:
        self._name(place)
        if said and not self.answer:
            self._fold(said.thinking_tokens, said.thinking_seconds, ended=bool(said.answer))
        self.close()
        if said and self.answer.strip() != said.answer.strip() and said.answer.strip():
            # What was taken for thinking or for the answer was not.
            self._write(f"\n\n{clean(said.answer)}")
        if said and said.answer.strip():
            self.console.print()
        for line in lines:
            self.view.note(line)
        self._begin()

    def close(self) -> None:
        """Leave the window, if it is open."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _name(self, place: int) -> None:
        if len(self.names) > 1 and not self.is_named:
            self.console.print(Text(clean(self.names[place]), style="bold"), soft_wrap=True)
        self.is_named = True

    def _think(self, text: str) -> None:
        if self.view.unfolded:
            self._write(text, DIM)
        elif not self.console.is_dumb_terminal:
            if self.live is None:
                self.live = Live(console=self.console, transient=True, auto_refresh=False, redirect_stderr=False)
                self.live.start()
            if time.monotonic() - self.last_look >= REDRAW:
                self.last_look = time.monotonic()
                self.live.update(_tail(self.console, clean(self.thinking), self.console.width, WINDOW), refresh=True)

    def _fold(self, tokens: int, seconds: float, *, ended: bool) -> None:
        """Close the window of thinking, and leave a line in its place."""
        self.close()
        if not self.thinking.strip():
            return
        if self.view.unfolded:
            self._write("\n" if self.thinking.endswith("\n") else "\n\n")
        else:
            self.view.note(thought_line(tokens, seconds, ended=ended))

    def _write(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), end="", soft_wrap=True)


class _Columns(Turn):
    """Two replies side by side: their last lines while they come, and all of them at the end."""

    def __init__(self, view: Terminal, names: Sequence[str]):
        self.view, self.console = view, view.console
        self.width = (self.console.width - GAP * (len(names) - 1)) // len(names)
        self.names = names
        self.thinking, self.answers = [""] * len(names), [""] * len(names)
        self.folds, self.feet = [""] * len(names), [[] for _ in names]
        self.last_look = 0.0
        self.live = Live(console=self.console, transient=True, auto_refresh=False, redirect_stderr=False)
        self.live.start()

    def show(self, place: int, kind: str, text: str, heard: Heard) -> None:
        if kind == THINKING:
            self.thinking[place] += text
        else:
            self.answers[place] += text
            self.folds[place] = thought_line(heard.thinking_tokens, heard.thinking_seconds)
        if time.monotonic() - self.last_look >= REDRAW:
            self.last_look = time.monotonic()
            self.live.update(self._grid(self.console.height - 2), refresh=True)

    def end(self, place: int, said: Said | None, lines: list[str]) -> None:
        self.feet[place] = lines
        if said:
            self.thinking[place], self.answers[place] = said.reasoning, said.answer
            ended = bool(said.answer)
            self.folds[place] = thought_line(said.thinking_tokens, said.thinking_seconds, ended=ended)
        self.live.update(self._grid(self.console.height - 2), refresh=True)

    def close(self) -> None:
        self.live.stop()
        self.console.print(self._grid(None))

    def _grid(self, height: int | None) -> Table:
        """All columns, or their last lines."""
        grid = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        for name in self.names:
            grid.add_column(Text(clean(name)), width=self.width, overflow="fold")
        grid.add_row(*(Text(clean(name), style="bold", overflow="fold") for name in self.names))
        cells = [self._cell(place) for place in range(len(self.names))]
        grid.add_row(*(cell if height is None else _lines(self.console, cell, self.width, height) for cell in cells))
        return grid

    def _cell(self, place: int) -> Text:
        thinking = self.thinking[place].strip("\n")
        folded = self.folds[place] and not self.view.unfolded
        parts = [(self.folds[place] if folded else clean(thinking), DIM)] if thinking else []
        parts += [(clean(self.answers[place]), "")] if self.answers[place].strip() else []
        parts += [(clean(line), DIM) for line in self.feet[place]]
        return Text("\n", overflow="fold").join([Text(text, style=style, overflow="fold") for text, style in parts])


def _tail(console: Console, text: str, width: int, height: int) -> Text:
    """The last lines of a text, dim."""
    return _lines(console, Text(text[-2 * width * height :].lstrip("\n"), style=DIM, overflow="fold"), width, height)


def _lines(console: Console, text: Text, width: int, height: int) -> Text:
    """The last lines of a text as it is wrapped."""
    return Text("\n").join(text.wrap(console, width, overflow="fold")[-height:])
