"""Merge checkpoints by stated weights in one pass: a soup (equal weights), or 0.9 x soup + 0.1 x long context.

python merge/linear.py pipeline=tiny stage=merge
"""

from smolpost.cli import job
from smolpost.merging.linear import merge


def linear(stage, inputs, folder):
    weighted = [(name, inputs[name], weight) for name, weight in stage.plan.weights.items()]
    # A checkpoint from before SFT, strong at long context, has another template; the stage's `base` names the result's.
    return merge(
        weighted, stage.plan.base, folder, stage.plan.config.dtype, verification="full", allow_template_change=True
    )


if __name__ == "__main__":
    job("merge", linear)
