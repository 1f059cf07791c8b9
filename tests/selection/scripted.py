"""An evaluation without a model: prompt i is answered where a hidden difficulty is below the point's skill."""

import numpy as np

from smolpost.evaluation.scores import aggregate
from smolpost.evaluation.task import Sample


class Scripted:
    """Counts its calls; skill: weights -> task -> skill in [0, 1]."""

    def __init__(self, skill, number=100, seed=0):
        self.skill, self.number, self.seed, self.calls = skill, number, seed, []

    def __call__(self, weights, folder):
        self.calls.append(folder.name)
        found = {}
        for task, skill in self.skill(weights).items():
            right = (np.arange(self.number) + 0.5) / self.number < skill
            samples = [Sample(str(i), {"right": float(r), "loss": 1.0 - r}) for i, r in enumerate(right)]
            found[task] = {"scores": aggregate(samples, self.seed), "samples": [vars(sample) for sample in samples]}
        return found
