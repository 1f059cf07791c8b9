"""On-policy distillation: a teacher corrects the student's own replies, token by token."""

from dataclasses import dataclass

from smolpost.data.settings import CompletionRows
from smolpost.errors import Wrong
from smolpost.stages.base import stage_kind
from smolpost.stages.train import TrainStage
from smolpost.training.settings import DistillTraining


@stage_kind
@dataclass
class DistillStage(TrainStage, DistillTraining):
    kind: str = "distill"

    VERSION = 1
    ROWS = CompletionRows

    def parents(self):
        return [*super().parents(), ("teacher", self.teacher)]

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        if self.overlong == "split":
            raise Wrong(f"{key}.overlong", "=split cannot be done to a reply; choose one of: refuse, truncate, drop")

    def check_start(self, work):
        from smolpost.training.teacher import check_teacher, template_note

        super().check_start(work)
        name, teacher = work.stage.entry, self.teacher_of(work)
        check_teacher(name, self, teacher, work.inputs[self.init_from], work.recipe.model.attn_implementation)
        if note := template_note(name, self, teacher):
            print(note, flush=True)

    def teacher_of(self, work):
        return work.inputs[self.teacher]

    def method(self):
        from smolpost.training.with_trl import distill

        return distill
