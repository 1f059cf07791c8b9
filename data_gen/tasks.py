"""Write a pipeline's synthetic tasks with checkable answers: copy, key-value recall, pointer chase.

python data_gen/tasks.py pipeline=tiny stage=tasks
"""

from smolpost.cli import job

if __name__ == "__main__":
    job("tasks")
