"""A greedy soup: checkpoints join one by one where a held-out score does not fall, and the mean of the kept is written.

python merge/greedy.py pipeline=tiny stage=greedy
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("greedy")
