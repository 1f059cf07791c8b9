"""How much long context to mix into a soup: every weight evaluated in memory, one picked by a stated rule, one written.

python merge/sweep.py pipeline=tiny stage=sweep
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("sweep")
