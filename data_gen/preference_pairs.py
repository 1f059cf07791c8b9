"""Sample a stronger and a weaker checkpoint on the same prompts; write SmolTalk2 Preference rows.

In small what the recipe did with Qwen3-32B (chosen) against Qwen3-0.6B (rejected).

python data_gen/preference_pairs.py pipeline=tiny stage=pairs
"""

from smolpost.chat.render import load_template
from smolpost.cli import job
from smolpost.data.mixtures import mix
from smolpost.model.loading import load_for_inference
from smolpost.synthesis.pairs import sample_pairs


def pairs(stage, folder):
    config = stage.plan.config
    samplers = []
    for name in (config.chosen_from, config.rejected_from):
        model, tokenizer = load_for_inference(stage.inputs[name][0])
        tokenizer.chat_template = load_template(config.template)
        samplers.append((model, tokenizer))
    return sample_pairs(config, mix(stage.data[config.prompts]), *samplers, folder)


if __name__ == "__main__":
    job("pairs", pairs, resumable=True)
