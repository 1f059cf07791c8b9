"""Sample a stronger and a weaker checkpoint on the same prompts; write SmolTalk2 Preference rows.

In small what the recipe did with Qwen3-32B (chosen) against Qwen3-0.6B (rejected).

python data_gen/preference_pairs.py pipeline=tiny stage=pairs
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("pairs")
