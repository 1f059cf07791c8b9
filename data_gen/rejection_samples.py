"""Ask a teacher several times about each prompt; write a SmolTalk2 row with a reply whose answer is right.

python data_gen/rejection_samples.py pipeline=./mine.yaml stage=verified
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("rejection_samples")
