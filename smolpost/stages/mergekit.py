"""A merge by one of mergekit's methods or its YAML files, behind the checks of a linear one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolpost.errors import Wrong
from smolpost.schema import DTYPES, MISSING, choice, seeded, tuning
from smolpost.stages.base import Work, leaves, stage_kind
from smolpost.stages.merging import MergedModel


@stage_kind
@dataclass
class MergekitStage(MergedModel):
    kind: str = "mergekit"
    inputs: dict[str, Any] = field(default_factory=dict)  # stage or "checkpoint" -> its parameters: {weight: 0.5}
    base: str = MISSING  # the input whose config, tokenizer and chat template the result has
    method: str | None = None  # mergekit's name, e.g. slerp, ties, dare_ties
    parameters: dict[str, Any] = field(default_factory=dict)  # of the whole merge, and defaults for the inputs'
    base_model: str | None = None  # the input that differences are taken from, where the method needs one
    config: str | None = None  # mergekit YAML that names the inputs as its models, in place of method and parameters
    dtype: str = choice(*DTYPES)  # of the merged weights on disk; a YAML has its own
    seed: int = seeded(0)  # of methods that draw numbers; with 0, the random_seed of a YAML that has one
    allow_template_change: bool = tuning(False)  # merge inputs that speak other chat templates than the base

    VERSION = 1
    SCRIPT = "merge/method.py"

    def parents(self):
        return [("inputs", name) for name in self.inputs]

    def base_input(self, stages):
        return leaves(self.base, stages)[0]  # the inputs are finished models, soups among them

    def check(self, key, recipe, place):
        if (self.method is None) == (self.config is None):
            raise Wrong(key, " needs a method of mergekit's or a config, its YAML file; give one of them")
        if self.config and (self.parameters or self.base_model or any(self.inputs.values())):
            raise Wrong(
                f"{key}.config",
                f"={self.config} states parameters and base_model itself; give the inputs' names alone, as "
                "{NAME: {}}",
            )
        if self.config and not Path(self.config).is_file():
            raise Wrong(f"{key}.config", f"={self.config} is not a file; name a mergekit YAML")
        super().check(key, recipe, place)

    def key_parts(self, keys, stage):
        return {"config_file": keys.file(self.config)} if self.config else {}

    def make(self, work: Work):
        from smolpost.merging.mergekit.methods import merge_method, merge_yaml

        base, shared = work.stage.base, {"allow_template_change": self.allow_template_change}
        if self.config:
            # A file has a seed of its own, which the stage's may replace.
            seed = self.seed or None
            return merge_yaml(Path(self.config), work.folder, work.inputs, base=base, seed=seed, **shared)
        # A stage with several seeds stands for all of them, each with the stage's parameters.
        own = {leaf: self.inputs.get(leaf, self.inputs.get(leaf.rpartition("-")[0])) for leaf in work.inputs}
        named = [(leaf, place, dict(own[leaf] or {})) for leaf, place in work.inputs.items()]
        return merge_method(
            self.method, named, base, work.folder, self.dtype, parameters=dict(self.parameters),
            base_model=self.base_model, seed=self.seed, **shared,
        )  # fmt: skip
