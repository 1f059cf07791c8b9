"""The chat itself: what the user types, and what becomes of it."""

import shlex
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from smolpost.errors import UserError
from smolpost.signals import Stopped
from smolpost.talk.calls import calls_of
from smolpost.talk.conversation import INTERRUPTED, Conversation, Said, Tools, read_tools
from smolpost.talk.saved import SavedRow
from smolpost.talk.settings import Settings, changed
from smolpost.talk.speaker import Speaker
from smolpost.talk.view import Turn, View, clean, foot_lines

NO_TOOLS = Tools()
DEFAULT_FILE = "chats.jsonl"
LONGEST_CALL = 60  # characters of a call that a prompt shows; all of it stands above
WORDS = {True: "think", False: "no_think"}


class Command(NamedTuple):
    arguments: str
    help: str
    run: Callable[["Session", str], object]


class Session:
    """One or two speakers, each with a conversation of its own; they get the same prompts and settings.

    Args:
        thinking: Whether replies are to think; None: as each template decides.
        save: File for the conversations; None: they are not kept.
    """

    def __init__(
        self,
        speakers: Sequence[Speaker],
        view: View,
        settings: Settings,
        *,
        thinking: bool | None = None,
        system: str = "",
        tools: Tools = NO_TOOLS,
        save: Path | None = None,
    ):
        self.speakers, self.view, self.settings, self.thinking = speakers, view, settings, thinking
        self.names = [speaker.name for speaker in speakers]
        if len(set(self.names)) < len(self.names):
            self.names = [f"{name} ({number})" for number, name in enumerate(self.names, 1)]
        self.conversations = [Conversation() for _ in speakers]
        for conversation in self.conversations:
            conversation.with_system(system)
            conversation.with_tools(tools)
        self.rows: list[SavedRow] = []
        self.is_open = True
        if save is not None:
            self._save_to(save)
        if thinking is not None:
            self._say_where_modes_are_fixed()

    def run(self) -> None:
        """Talk until the user leaves.

        Raises:
            UserError: Something is wrong with a line of a pipe; in a terminal the user is told and goes on.
        """
        while self.is_open and (line := self.view.read(self._prompt())) is not None:
            try:
                self._take(line)
            except UserError as error:
                if not self.view.interactive:
                    raise
                self.view.note(str(error))

    def _prompt(self) -> str:
        if call := next((c.awaited[0][0] for c in self.conversations if c.awaited), None):
            return f"result of {clean(' '.join(call.split()))[:LONGEST_CALL]}> "
        pairs = zip(self.speakers, self.conversations, strict=True)
        try:
            modes = {speaker.mode(conversation, self.thinking) for speaker, conversation in pairs}
        except UserError:  # a template that refuses the system message: the next reply says so
            return "> "
        return f"{WORDS.get(modes.pop(), '')}> " if len(modes) == 1 else "> "

    def _take(self, line: str) -> None:
        first, _, rest = line.partition(" ")
        if first.startswith("/") and "/" not in first[1:]:
            if first not in COMMANDS:
                raise UserError(f"{first} is not a command; /help lists them, and a blank before it makes it a message")
            COMMANDS[first].run(self, rest.strip())
        elif any(conversation.awaited for conversation in self.conversations):
            self._result(line.strip())
        elif line.strip():
            self._ask(line.strip())

    # ------------------------------------------------------------ replies

    def _ask(self, text: str) -> None:
        for conversation in self.conversations:
            conversation.ask(text)
        self._reply()

    def _result(self, text: str) -> None:
        """Give the result of a call to each model that waits for one."""
        waiting = [conversation for conversation in self.conversations if conversation.awaited]
        if not waiting:
            raise UserError("no call waits for a result; /tools FILE gives the model tools to call")
        call = waiting[0].awaited[0][0]
        for conversation in waiting:
            if conversation.awaited[0][0] == call:
                conversation.give_result(text)
        self._reply()

    def _reply(self) -> None:
        """Let each model reply whose conversation waits for it."""
        pairs = list(zip(self.speakers, self.conversations, strict=True))
        places = [place for place, (_, conversation) in enumerate(pairs) if conversation.unanswered]
        if not places:
            return
        attempt = max(pairs[place][1].attempts for place in places)
        seed = self.settings.seed_of(attempt)
        with self.view.turn([self.names[place] for place in places]) as turn:
            for number, place in enumerate(places):
                self._reply_of(*pairs[place], seed, turn, number)
        self._save()

    def _reply_of(self, speaker: Speaker, conversation: Conversation, seed: int, turn: Turn, place: int) -> None:
        try:
            said = speaker.reply(
                conversation, self.settings, self.thinking, seed, lambda *piece: turn.show(place, *piece)
            )
        except UserError as error:
            if not self.view.interactive:
                raise
            turn.end(place, None, [str(error)])
            return
        if said.finish == INTERRUPTED and not self.view.interactive:
            raise Stopped(signal.SIGINT)
        if said.empty:
            conversation.attempts += 1
            turn.end(place, None, [f"{speaker.name} said nothing; /retry asks again"])
            return
        calls = calls_of(said, conversation.frame.tools)
        conversation.answer(said, calls)
        turn.end(place, said, [*_surprise(said), *foot_lines(said, [call for call, _ in calls])])

    # ------------------------------------------------------------ saving

    def _save_to(self, file: Path) -> None:
        self.rows = [SavedRow(file) for _ in self.speakers]

    def _save(self) -> None:
        for speaker, conversation, saved in zip(self.speakers, self.conversations, self.rows, strict=False):
            try:
                saved.write(conversation.row(f"chat/{Path(speaker.name).name}"))
            except OSError as error:
                self.rows = []
                why = f"{saved.file} cannot be written ({error.strerror})"
                raise UserError(f"{why}; /save FILE names another") from error

    # ------------------------------------------------------------ commands

    def help(self, text: str) -> None:
        width = max(len(f"{name} {command.arguments}") for name, command in COMMANDS.items())
        lines = [f"{f'{name} {c.arguments}':{width}}  {c.help}" for name, c in COMMANDS.items()]
        keys = "ctrl-C ends a reply; at the prompt it leaves, as ctrl-D does. A line that ends in \\ goes on."
        self.view.note("\n".join([*lines, keys]))

    def think(self, thinking: bool) -> None:
        self.thinking = thinking
        self._say_where_modes_are_fixed()

    def _say_where_modes_are_fixed(self) -> None:
        for speaker, name, conversation in zip(self.speakers, self.names, self.conversations, strict=True):
            if self.thinking is not None and speaker.mode(conversation, self.thinking) is None:
                words = conversation.frame.system.split()
                if "/think" in words or "/no_think" in words:
                    why = "its system message decides the mode; /system TEXT without /think and /no_think frees it"
                else:
                    why = "its chat template has no think mode"
                self.view.note(f"{name}: /{WORDS[self.thinking]} changes nothing, as {why}")

    def system(self, text: str) -> None:
        before = self.conversations[0].frame.system
        for conversation in self.conversations:
            conversation.with_system(text)
        self.view.note("the system message is set" if text else f"no system message now; it was: {before or '(none)'}")
        self._say_where_modes_are_fixed()

    def set(self, text: str) -> None:
        self.settings = changed(self.settings, text.split())
        self.view.note(str(self.settings))

    def tools(self, text: str) -> None:
        tools = read_tools(_path(text, "/tools")) if text else Tools()
        for conversation in self.conversations:
            conversation.with_tools(tools)
        then = "type the results of its calls" if tools else "/tools FILE adds some"
        self.view.note(f"the model has {tools}; {then}")

    def undo(self, text: str) -> None:
        texts = [conversation.take_back_exchange() for conversation in self.conversations]
        if not any(texts):
            raise UserError("there is nothing to take back")
        self._save()
        self.view.note(f"taken back: {next(filter(None, texts))}")

    def retry(self, text: str) -> None:
        if not any([conversation.take_back_reply() for conversation in self.conversations]):
            raise UserError("there is nothing to reply to; type a message first")
        self._reply()

    def clear(self, text: str) -> None:
        for conversation in self.conversations:
            conversation.clear()
        for saved in self.rows:
            saved.leave()
        self.view.note("a new conversation begins; system message, tools and settings stay")

    def save(self, text: str) -> None:
        file = _path(text or DEFAULT_FILE, "/save")
        if not self.rows or self.rows[0].file != file:
            self._save_to(file)
        self._save()
        kept = sum(conversation.row("") is not None for conversation in self.conversations)
        now = f"{kept} {'row is' if kept == 1 else 'rows are'} in {file}" if kept else f"nothing is in {file} yet"
        self.view.note(f"{now}; it is written again after each reply that ends by itself")

    def history(self, text: str) -> None:
        for name, conversation in zip(self.names, self.conversations, strict=True):
            head = [name] if len(self.names) > 1 else []
            lines = [f"{m['role']}: {_readable(m)}" for m in conversation.messages]
            self.view.note("\n".join([*head, *(lines or ["nothing was said yet"])]))

    def fold(self, text: str) -> None:
        self.view.unfolded = False
        self.view.note("thinking folds to one line from now on")

    def unfold(self, text: str) -> None:
        self.view.unfolded = True
        lasts = [(name, conversation.last) for name, conversation in zip(self.names, self.conversations, strict=True)]
        thoughts = [
            (f"{name}:\n" if len(self.names) > 1 else "") + said.reasoning.strip("\n")
            for name, said in lasts
            if said and said.reasoning.strip()
        ]
        self.view.note("\n\n".join(thoughts) or "thinking stays open from now on; /fold folds it again")

    def leave(self, text: str) -> None:
        self.is_open = False


COMMANDS = {
    "/think": Command("", "think before answering, from the next reply on", lambda s, text: s.think(True)),
    "/no_think": Command("", "answer at once, from the next reply on", lambda s, text: s.think(False)),
    "/fold": Command("", "show thinking in one line", Session.fold),
    "/unfold": Command("", "show the last thinking, and let it stay open", Session.unfold),
    "/system": Command("TEXT", "set the system message; without TEXT: remove it", Session.system),
    "/set": Command("NAME=VALUE", "change sampling settings; without words: show them", Session.set),
    "/tools": Command("FILE", "give the model the tools of a JSON file; without FILE: none", Session.tools),
    "/result": Command("TEXT", "the result of the call that the model waits for", Session._result),
    "/undo": Command("", "take the last message and its replies back", Session.undo),
    "/retry": Command("", "ask for another reply to the last message", Session.retry),
    "/clear": Command("", "begin a new conversation", Session.clear),
    "/save": Command("FILE", f"keep the conversation as a row of a JSONL file; default {DEFAULT_FILE}", Session.save),
    "/history": Command("", "show the conversation", Session.history),
    "/help": Command("", "list the commands", Session.help),
    "/exit": Command("", "leave", Session.leave),
}


def _surprise(said: Said) -> list[str]:
    """A line about a model that thought although it was asked not to."""
    thinks = said.mode is False and said.reasoning.strip()
    return ["it thought, although it was asked not to"] if thinks else []


def _path(text: str, command: str) -> Path:
    """A path as a user types it, with quotes or ~."""
    try:
        [path] = shlex.split(text)
    except ValueError:
        raise UserError(f"{command} {text} does not name one file; put quotes around a name with blanks") from None
    return Path(path).expanduser()


def _readable(message: dict) -> str:
    content = message.get("content") or ""
    calls = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    return content + (f" calls {', '.join(calls)}" if calls else "")
