"""Preference rows: a stronger teacher's reply is chosen, a weaker one's rejected.

The recipe did this with Qwen3-32B (chosen) against Qwen3-0.6B (rejected). The miniature takes two of its checkpoints.
"""

from dataclasses import dataclass, field

from smolpost.errors import Wrong
from smolpost.schema import choice, number
from smolpost.stages.base import Work, stage_kind
from smolpost.stages.generation import GenerationStage
from smolpost.synthesis.settings import FromRows, Teacher


@stage_kind
@dataclass
class PairsStage(GenerationStage, FromRows):
    kind: str = "pairs"
    chosen: Teacher = field(default_factory=Teacher)  # the stronger one; the filters judge its replies alone
    rejected: Teacher = field(default_factory=Teacher)  # the weaker one
    # The last two compare answers with the row's: as text, or as mathematics unless filters.answer is off.
    keep: str = choice("different", "chosen_right", "right_and_wrong")
    max_similarity: float | None = number("(0, 1]", None)  # of the two replies by words; pairs from it on are dropped
    only_missing: str | None = None  # mixture name; sources that have pairs of the teachers' mode there are left out
    suffix: str = "_pairs"  # of the rows' source

    VERSION = 2
    SCRIPT = "data_gen/preference_pairs.py"
    ROLES = ("chosen", "rejected")

    def mixtures(self):
        return [*super().mixtures(), *([("only_missing", self.only_missing)] if self.only_missing else [])]

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        modes = {role: "null" if t.thinking is None else str(t.thinking).lower() for role, t in self.teachers().items()}
        if modes["chosen"] != modes["rejected"]:
            raise Wrong(
                f"{key}.rejected.thinking",
                f"={modes['rejected']}, but chosen.thinking={modes['chosen']}; a pair has one mode, so set both to one",
            )
        if self.only_missing and self.chosen.thinking is None:
            raise Wrong(
                f"{key}.only_missing",
                f"={self.only_missing} needs one mode for all prompts; set chosen.thinking and rejected.thinking to "
                "true or false",
            )

    def job(self, work: Work):
        from smolpost.synthesis.jobs.complement import sources_of_mode
        from smolpost.synthesis.jobs.preference_pairs import PreferencePairs

        complete = ()
        if self.only_missing:
            complete = sources_of_mode(work.rows(self.only_missing), self.chosen.thinking, self.suffix)
        return PreferencePairs(self, work.prompts(self.prompts), complete)
