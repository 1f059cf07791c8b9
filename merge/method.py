"""Merge checkpoints by one of mergekit's methods, or by its YAML file as it is, behind the checks of a linear merge.

python merge/method.py pipeline=tiny +schema@stages.slerp=mergekit stages.slerp.method=slerp stages.slerp.base=soup \
    +stages.slerp.inputs.soup={} +stages.slerp.inputs.long_context={} +stages.slerp.parameters.t=0.1 stage=slerp
"""

from pathlib import Path

from smolpost.cli import job
from smolpost.merging.mergekit.methods import merge_method, merge_yaml


def by_method(stage, inputs, folder):
    config = stage.plan.config
    shared = {"allow_template_change": config.allow_template_change}
    if config.config:
        # A file has a seed of its own, which the stage's may replace.
        seed = config.seed or None
        return merge_yaml(Path(config.config), folder, inputs, base=stage.plan.base, seed=seed, **shared)
    # A stage with several seeds stands for all of them, each with the stage's parameters.
    own = {leaf: config.inputs.get(leaf, config.inputs.get(leaf.rpartition("-")[0])) for leaf in inputs}
    named = [(leaf, place, dict(own[leaf] or {})) for leaf, place in inputs.items()]
    return merge_method(
        config.method, named, stage.plan.base, folder, config.dtype, parameters=dict(config.parameters),
        base_model=config.base_model, seed=config.seed, **shared,
    )  # fmt: skip


if __name__ == "__main__":
    job("mergekit", by_method)
