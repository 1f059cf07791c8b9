"""Ask a thinking teacher the prompts of rows without reasoning; write SmolTalk2 rows in think mode.

The recipe did this with Qwen3-32B for each domain that had no reasoning data.

python data_gen/reasoning_traces.py pipeline=./mine.yaml stage=traces
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("reasoning_traces")
