"""KTO on completions with labels, and on preference pairs taken apart, beside a reference."""

from dataclasses import dataclass

from smolpost.data.settings import LabelledRows
from smolpost.errors import Wrong
from smolpost.stages.base import stage_kind
from smolpost.stages.train import TrainStage
from smolpost.training.settings import KTOTraining


@stage_kind
@dataclass
class KTOStage(TrainStage, KTOTraining):
    kind: str = "kto"

    VERSION = 1
    ROWS = LabelledRows

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        if self.overlong == "split":
            raise Wrong(f"{key}.overlong", "=split cannot be done to a completion; choose refuse, truncate or drop")
        if self.loss == "kto" and self.micro_batch_size < 2:
            raise Wrong(
                f"{key}.micro_batch_size",
                "=1 leaves a prompt no other completion of its forward pass, which kto estimates the KL divergence "
                "from; set 2 or more, or loss=apo_zero_unpaired",
            )
        if self.global_batch_size % self.micro_batch_size:
            raise Wrong(
                f"{key}.global_batch_size",
                f"={self.global_batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}; change one "
                "of them",
            )

    def method(self):
        from smolpost.training.with_trl import kto

        return kto
