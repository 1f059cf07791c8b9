"""Verified rows: several replies to each prompt, of which those stay that pass the filters (rejection sampling)."""

from dataclasses import dataclass, field

from smolpost.errors import Wrong
from smolpost.schema import choice, count
from smolpost.stages.base import Work, stage_kind
from smolpost.stages.generation import GenerationStage
from smolpost.synthesis.settings import Filters, FromRows, Teacher


@stage_kind
@dataclass
class RejectionSamplesStage(GenerationStage, FromRows):
    kind: str = "rejection_samples"
    teacher: Teacher = field(default_factory=Teacher)
    num_samples: int = count(4)  # requests per prompt, each with a seed of its own
    keep: str = choice("first_right", "shortest_right", "random_right", "all_right")  # of those that pass all filters
    filters: Filters = field(default_factory=lambda: Filters(answer="keep"))
    suffix: str = "_verified"  # of the rows' source

    VERSION = 1
    SCRIPT = "data_gen/rejection_samples.py"
    ASKED = ("num_samples",)

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        if self.num_samples > 1 and not self.teacher.temperature:
            raise Wrong(
                f"{key}.teacher.temperature",
                f"=0 gives {self.num_samples} equal replies; raise it, or set {key}.num_samples=1",
            )

    def job(self, work: Work):
        from smolpost.synthesis.jobs.rejection_samples import RejectionSamples

        return RejectionSamples(self, work.prompts(self.prompts))
