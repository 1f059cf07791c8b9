"""Write practice rows: word problems, conversations with tools, preference pairs, function-calling questions.

It draws them at random, with answers that follow, and needs no model, no file and no network.

python data_gen/practice.py pipeline=gsm8k data=practice stage=practice
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("practice")
