"""Merge checkpoints by stated weights in one pass: a soup (equal weights), or 0.9 x soup + 0.1 x long context.

python merge/linear.py pipeline=tiny stage=merge
"""

from pathlib import Path

from smolpost.cli import job
from smolpost.merging.mergekit import merge


def linear(stage, folder):
    inputs = [(name, Path(checkpoint), weight) for name, (checkpoint, weight) in stage.inputs.items()]
    return merge(inputs, stage.plan.base, folder, stage.plan.config.dtype)


if __name__ == "__main__":
    job("merge", linear)
