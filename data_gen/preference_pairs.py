"""Ask a strong and a weak teacher the same prompts; write SmolTalk2 Preference rows.

The recipe did this with Qwen3-32B (chosen) against Qwen3-0.6B (rejected); the miniature takes two of its checkpoints.

python data_gen/preference_pairs.py pipeline=tiny stage=pairs
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("pairs")
