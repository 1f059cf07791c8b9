"""Everyday conversations in six languages, both sides written by a teacher."""

from dataclasses import dataclass, field
from pathlib import Path

from smolpost.errors import UserError, Wrong
from smolpost.files import digest
from smolpost.schema import count
from smolpost.stages.base import Work, stage_kind
from smolpost.stages.generation import GenerationStage
from smolpost.synthesis.settings import Filters, Teacher

CODES = ("en", "fr", "es", "de", "it", "pt")
OWN = Path(__file__).parent.parent / "synthesis" / "everyday"  # the library's personas and topics


def equal_shares() -> dict[str, float]:
    return dict.fromkeys(CODES, 1.0)


@stage_kind
@dataclass
class EverydayConversationsStage(GenerationStage):
    kind: str = "everyday_conversations"
    teacher: Teacher = field(default_factory=lambda: Teacher(thinking=False))
    num_conversations: int = count(1000)
    min_turns: int = count(2)  # of the user, each with a reply
    max_turns: int = count(4)
    languages: dict[str, float] = field(default_factory=equal_shares)  # code -> share of the conversations; 0: none
    personas: str | None = None  # file with a persona per line; null: the library's own
    topics: str | None = None  # file with a topic per line; null: the library's own
    filters: Filters = field(default_factory=lambda: Filters(language=True))

    VERSION = 1
    SCRIPT = "data_gen/everyday_conversations.py"
    ASKED = ("num_conversations", "min_turns", "max_turns", "languages")

    def mixtures(self):
        return []

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        if self.min_turns > self.max_turns:
            raise Wrong(f"{key}.min_turns", f"={self.min_turns} is above max_turns={self.max_turns}; lower it")
        for code, share in self.languages.items():
            if code not in CODES:
                raise Wrong(f"{key}.languages.{code}", f" is not a language here; choose some of: {', '.join(CODES)}")
            if share < 0:
                raise Wrong(f"{key}.languages.{code}", f"={share:g} is below 0; give a share, or 0 for none")
        if not any(self.languages.values()):
            raise Wrong(f"{key}.languages", " has no share above 0; give one")
        if self.filters.answer != "off":
            raise Wrong(f"{key}.filters.answer", f"={self.filters.answer} needs right answers; set it to off")
        for name in ("personas", "topics"):
            if not self._file(name).is_file():
                raise Wrong(f"{key}.{name}", f"={self._file(name)} is not a file; name one with a line for each")

    def reply_parts(self, keys, stage):
        lines = {name: digest(self.lines(name)) for name in ("personas", "topics")}
        return {role: parts | lines for role, parts in super().reply_parts(keys, stage).items()}

    def lines(self, name: str) -> list[str]:
        """The lines of the file of personas or topics, without empty ones.

        Raises:
            UserError: There are none, or the file is not UTF-8.
        """
        file = self._file(name)
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError:
            raise UserError(f"{file}: is not UTF-8; save it as UTF-8") from None
        if not any(lines):
            raise UserError(f"{file}: has no line; write one for each of the {name}")
        return list(dict.fromkeys(filter(None, lines)))

    def _file(self, name: str) -> Path:
        return Path(getattr(self, name) or OWN / f"{name}.txt")

    def modes(self, role):
        return {False, bool(self.teacher.thinking)}  # a user's turns are written without thinking

    def job(self, work: Work):
        from smolpost.synthesis.jobs.everyday_conversations import EverydayConversations

        return EverydayConversations(self, self.lines("personas"), self.lines("topics"))
