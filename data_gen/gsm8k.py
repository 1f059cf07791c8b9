"""Write GSM8K's problems as SmolTalk2 rows: reasoning, think and no-think replies, preference pairs.

The public JSONL file or the data set on the Hub is all that it reads.

python data_gen/gsm8k.py pipeline=gsm8k stage=gsm8k
python data_gen/gsm8k.py pipeline=gsm8k stage=gsm8k data.problems.sources.gsm8k.path=train.jsonl
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("gsm8k")
