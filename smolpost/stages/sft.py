"""Mid-training and SFT on packs of documents."""

from dataclasses import dataclass

from smolpost.data.settings import DocumentRows
from smolpost.stages.base import stage_kind
from smolpost.stages.train import TrainStage
from smolpost.training.settings import PackTraining


@stage_kind
@dataclass
class SFTStage(TrainStage, PackTraining):
    kind: str = "sft"

    VERSION = 1
    ROWS = DocumentRows

    def method(self):
        if self.engine == "trl":
            from smolpost.training.with_trl import sft
        else:
            from smolpost.training import sft

        return sft
