"""Rows whose turns switch between thinking and not, so that a hybrid model follows /think and /no_think in any turn."""

from dataclasses import dataclass, field

from smolpost.errors import Wrong
from smolpost.schema import number
from smolpost.stages.base import Work, stage_kind
from smolpost.stages.generation import GenerationStage
from smolpost.synthesis.settings import FromRows, Teacher


@stage_kind
@dataclass
class ModeSwitchStage(GenerationStage, FromRows):
    kind: str = "mode_switch"
    teacher: Teacher = field(default_factory=Teacher)
    turns: int = number("[2, inf)", 3)  # rows with one user turn, of one source, that become one conversation
    suffix: str = "_mode_switch"  # of the rows' source

    VERSION = 1
    SCRIPT = "data_gen/mode_switch.py"
    ASKED = ("turns",)

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        if self.teacher.thinking is not None:
            raise Wrong(
                f"{key}.teacher.thinking",
                f"={str(self.teacher.thinking).lower()} fixes the mode that this stage switches; set it to null",
            )

    def modes(self, role):
        return {True, False}

    def job(self, work: Work):
        from smolpost.synthesis.jobs.mode_switch import ModeSwitch

        return ModeSwitch(self, work.prompts(self.prompts))
