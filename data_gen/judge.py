"""Let a judge score both sides of each pair, in both orders; write the pairs whose chosen side wins by a margin.

python data_gen/judge.py pipeline=./mine.yaml stage=judged
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("judge")
