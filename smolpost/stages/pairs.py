"""Preference rows: a stronger checkpoint's reply is chosen, a weaker one's rejected.

In small what the recipe did with Qwen3-32B (chosen) against Qwen3-0.6B (rejected).
"""

from dataclasses import dataclass

from smolpost.stages.base import Stage, Work, stage_kind
from smolpost.synthesis.settings import PairSettings


@stage_kind
@dataclass
class PairsStage(Stage, PairSettings):
    kind: str = "pairs"

    VERSION = 1
    RESUMABLE = True
    SCRIPT = "data_gen/preference_pairs.py"

    def parents(self):
        return [("chosen_from", self.chosen_from), ("rejected_from", self.rejected_from)]

    def mixtures(self):
        return [("prompts", self.prompts)]

    def key_parts(self, keys, stage):
        from smolpost.chat.render import load_template

        return {"template": load_template(self.template)}

    def make(self, work: Work):
        from smolpost.data.mixtures import mix
        from smolpost.model.loading import load_for_inference
        from smolpost.synthesis.pairs import sample_pairs

        rows = [row for _, row in mix(work.data[self.prompts])]
        chosen, rejected = (load_for_inference(work.inputs[name]) for name in (self.chosen_from, self.rejected_from))
        return sample_pairs(self, rows, chosen, rejected, work.folder)
