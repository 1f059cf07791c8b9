"""GRPO: reinforcement learning on rewarded samples of the model's own."""

from dataclasses import dataclass

from smolpost.data.settings import CompletionRows
from smolpost.errors import Wrong
from smolpost.registry import REWARDS
from smolpost.stages.base import stage_kind
from smolpost.stages.train import TrainStage
from smolpost.training.settings import PolicyTraining


@stage_kind
@dataclass
class GRPOStage(TrainStage, PolicyTraining):
    kind: str = "grpo"

    VERSION = 1
    ROWS = CompletionRows

    def key_parts(self, keys, stage):
        return {"reward_versions": {name: REWARDS[name].VERSION for name in self.rewards}}

    def nested_settings(self):
        return [
            (f"reward_settings.{name}", settings, REWARDS[name], f"the reward {name}")
            for name, settings in self.reward_settings.items()
            if name in REWARDS and name in self.rewards
        ]

    def check(self, key, recipe, place):
        super().check(key, recipe, place)
        if self.overlong == "split":
            raise Wrong(f"{key}.overlong", "=split cannot be done to a prompt; choose one of: refuse, truncate, drop")
        if not self.rewards:
            raise Wrong(
                f"{key}.rewards", f"={{}} rewards nothing; name rewards with their weights, of: {', '.join(REWARDS)}"
            )
        for name in self.rewards:
            if name not in REWARDS:
                raise Wrong(f"{key}.rewards.{name}", f" is not a reward; choose some of: {', '.join(REWARDS)}")
        for name in self.reward_settings:
            if name not in self.rewards:
                raise Wrong(f"{key}.reward_settings.{name}", f" is not read, as {key}.rewards does not name {name}")
        if self.beta and self.rope_theta is not None:
            raise Wrong(
                f"{key}.beta",
                f"={self.beta:g} compares with the start checkpoint, which TRL would load without rope_theta="
                f"{self.rope_theta:g}; set one of them to 0 or null",
            )

    def method(self):
        from smolpost.training.with_trl import grpo

        return grpo
