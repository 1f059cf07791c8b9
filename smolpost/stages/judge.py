"""Rows that a judge scores: a pair stays where the chosen side wins by a margin, a reply where its score is high."""

from dataclasses import dataclass, field

from smolpost.errors import Wrong
from smolpost.schema import number
from smolpost.stages.base import Work, stage_kind
from smolpost.stages.generation import GenerationStage
from smolpost.synthesis.settings import Filters, FromRows, Teacher


@stage_kind
@dataclass
class JudgeStage(GenerationStage, FromRows):
    kind: str = "judge"
    teacher: Teacher = field(default_factory=Teacher)
    criteria: str = "Judge how correct, complete and clear each reply is, and how well it follows the conversation."
    min_margin: float = number("[-9, 9]", 1.0)  # chosen minus rejected, of scores from 1 to 10; the mean of both orders
    min_score: float = number("[1, 10]", 7.0)  # of rows that are not pairs

    VERSION = 1
    SCRIPT = "data_gen/judge.py"
    ASKED = ("criteria",)

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        if self.filters != Filters():
            raise Wrong(f"{key}.filters", " are not read, as a judge's replies become no rows; leave them out")

    def modes(self, role):
        return {bool(self.teacher.thinking)}

    def job(self, work: Work):
        from smolpost.synthesis.jobs.judge import Judge

        return Judge(self, work.rows(self.prompts))
