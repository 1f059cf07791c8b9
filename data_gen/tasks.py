"""Write a pipeline's synthetic tasks with checkable answers: copy, key-value recall, pointer chase.

python data_gen/tasks.py pipeline=tiny stage=tasks
"""

from smolpost.cli import job
from smolpost.data.tasks import write_tasks


def tasks(stage, inputs, folder):
    config = stage.plan.config
    return write_tasks(config.files, config.seed, folder)


if __name__ == "__main__":
    job("tasks", tasks)
