"""Sample a stronger and a weaker checkpoint on the same prompts; write SmolTalk2 Preference rows.

In small what the recipe did with Qwen3-32B (chosen) against Qwen3-0.6B (rejected).

python data_gen/preference_pairs.py pipeline=tiny stage=pairs
"""

from smolpost.cli import job
from smolpost.data.mixtures import mix
from smolpost.model.loading import load_for_inference
from smolpost.synthesis.pairs import sample_pairs


def pairs(stage, inputs, folder):
    config = stage.plan.config
    rows = [row for _, row in mix(stage.data[config.prompts])]
    chosen, rejected = (load_for_inference(inputs[name]) for name in (config.chosen_from, config.rejected_from))
    return sample_pairs(config, rows, chosen, rejected, folder)


if __name__ == "__main__":
    job("pairs", pairs, resumable=True)
