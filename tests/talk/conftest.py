"""Models that reply as a test says, and chats with them that a list of lines drives."""

import contextlib

import pytest

from smolpost.talk.local import LocalSpeaker
from smolpost.talk.session import Session
from smolpost.talk.settings import Settings
from smolpost.talk.view import Turn, View
from tests.char_model import char_tokenizer
from tests.rigged import Rigged
from tests.synthesis.conftest import thinking_models  # noqa: F401  a fixture


class Script(View):
    """Types the lines and keeps what is shown: `said` has (place, Said or None, lines) of each reply."""

    def __init__(self, lines):
        self.lines, self.notes, self.said, self.shown = iter(lines), [], [], []

    def read(self, prompt):
        self.notes.append(prompt)
        return next(self.lines, None)

    def note(self, text):
        self.notes.append(text)

    @contextlib.contextmanager
    def turn(self, names):
        yield ScriptTurn(self)


class ScriptTurn(Turn):
    def __init__(self, script):
        self.script = script

    def show(self, place, kind, text, heard):
        self.script.shown.append((place, kind, text))

    def end(self, place, said, lines):
        self.script.said.append((place, said, lines))


@pytest.fixture(scope="session")
def tokenizer():
    return char_tokenizer()


@pytest.fixture
def rigged(tokenizer):
    """Return a factory of speakers: (reply function or text, name) -> LocalSpeaker with the smollm3 template."""

    def make(reply, name="sft", context=8192):
        model = Rigged(tokenizer, reply if callable(reply) else lambda prompt: reply)
        model.config.max_position_embeddings = context
        return LocalSpeaker(name, model, tokenizer)

    return make


@pytest.fixture
def chat():
    """Return a function that types lines into a chat and returns (session, script)."""

    def talk(speakers, lines, **options):
        script = Script(lines)
        session = Session(speakers, script, options.pop("settings", Settings(seed=0)), **options)
        session.run()
        return session, script

    return talk
