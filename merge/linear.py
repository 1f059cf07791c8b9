"""Merge checkpoints by stated weights in one pass: a soup (equal weights), or 0.9 x soup + 0.1 x long context.

python merge/linear.py pipeline=tiny stage=merge
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("merge")
