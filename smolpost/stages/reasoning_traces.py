"""Reasoning rows: prompts of rows without reasoning, answered by a teacher that thinks.

The recipe did this with Qwen3-32B for the domains of its SFT data that had no reasoning data.
"""

from dataclasses import dataclass, field

from smolpost.errors import Wrong
from smolpost.schema import choice
from smolpost.stages.base import Work, stage_kind
from smolpost.stages.generation import GenerationStage
from smolpost.synthesis.settings import FromRows, Teacher


@stage_kind
@dataclass
class ReasoningTracesStage(GenerationStage, FromRows):
    kind: str = "reasoning_traces"
    teacher: Teacher = field(default_factory=lambda: Teacher(thinking=True))
    turns: str = choice("last", "every")  # which assistant turns are asked for; every: each one, in order
    only_missing: str | None = None  # mixture name; sources that have rows of the teacher's mode there are left out
    suffix: str = "_traces"  # of the rows' source

    VERSION = 1
    SCRIPT = "data_gen/reasoning_traces.py"
    ASKED = ("turns",)

    def mixtures(self):
        return [*super().mixtures(), *([("only_missing", self.only_missing)] if self.only_missing else [])]

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        if self.only_missing and self.teacher.thinking is None:
            raise Wrong(
                f"{key}.only_missing",
                f"={self.only_missing} needs one mode for all prompts; set {key}.teacher.thinking to true or false",
            )

    def job(self, work: Work):
        from smolpost.synthesis.jobs.complement import sources_of_mode
        from smolpost.synthesis.jobs.reasoning_traces import ReasoningTraces

        complete = ()
        if self.only_missing:
            complete = sources_of_mode(work.rows(self.only_missing), self.teacher.thinking, self.suffix)
        return ReasoningTraces(self, work.prompts(self.prompts), complete)
