"""APO, DPO and their relatives on preference pairs, beside a reference."""

from dataclasses import dataclass

from smolpost.data.settings import PairRows
from smolpost.errors import Wrong
from smolpost.registry import LOSSES
from smolpost.schema import PACKED_ATTENTION
from smolpost.stages.base import stage_kind
from smolpost.stages.train import TrainStage
from smolpost.training.settings import PairTraining


@stage_kind
@dataclass
class APOStage(TrainStage, PairTraining):
    kind: str = "apo"

    VERSION = 1
    ROWS = PairRows

    def key_parts(self, keys, stage):
        return {"loss_version": LOSSES[self.loss].VERSION}

    def nested_settings(self):
        return [("loss_settings", self.loss_settings, LOSSES[self.loss], f"loss={self.loss}")]

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        if self.overlong == "split":
            raise Wrong(f"{key}.overlong", "=split cannot be done to a pair; choose one of: refuse, truncate, drop")
        attention = recipe.model.attn_implementation
        if attention != PACKED_ATTENTION:
            raise Wrong(
                key,
                f" trains on pairs that share their prompt, whose sides model.attn_implementation={attention} cannot "
                f"keep apart; set it to {PACKED_ATTENTION}",
            )

    def method(self):
        from smolpost.training import preference

        return preference
