"""mergekit's own runs, with which merges are compared, and weights of two models."""

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge

from tests.merging.checkpoints import weights

WEIGHTED = {"a": {"weight": 0.7}, "b": {"weight": 0.4}}
SPARSE = {"a": {"weight": 0.7, "density": 0.5}, "b": {"weight": 0.4, "density": 0.7}}


def theirs(config, out, seed=0):
    """What mergekit alone writes."""
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(random_seed=seed, quiet=True))
    return weights(out)


def same_bits(ours, golden):
    assert ours.keys() == golden.keys()
    for name, tensor in golden.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
