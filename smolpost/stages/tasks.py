"""Synthetic tasks with checkable answers, as SmolTalk2 JSONL files `NAME.jsonl`."""

from dataclasses import dataclass, field

from smolpost.data.tasks import VERSION, TaskFile, write_tasks
from smolpost.schema import seeded
from smolpost.stages.base import Stage, Work, stage_kind


@stage_kind
@dataclass
class TasksStage(Stage):
    kind: str = "tasks"
    seed: int = seeded(0)
    files: dict[str, TaskFile] = field(default_factory=dict)

    VERSION = VERSION
    SCRIPT = "data_gen/tasks.py"

    def folder_names(self):
        return {"files": list(self.files)}

    def key_parts(self, keys, stage):
        return {"files": [self.file_parts(f"{name}.jsonl") for name in self.files]}

    def file_parts(self, path):
        """Each file is drawn by itself; its blocks count in their order."""
        name = path.removesuffix(".jsonl")
        if name not in self.files:
            return None
        file = self.files[name]
        return [self.seed, name, file.replay, list(file.blocks.items()), self.VERSION]

    def make(self, work: Work):
        return write_tasks(self.files, self.seed, work.folder)
