"""Practice rows with checkable answers, drawn at random: what a pipeline can run on without any data of the user's."""

from dataclasses import dataclass

from smolpost.data.practice import ANSWERS, QUESTIONS, VERSION, write_practice
from smolpost.data.tool_conversations import STYLES
from smolpost.schema import count, seeded
from smolpost.stages.base import Stage, Work, stage_kind

READ_FROM = {  # file -> the field that counts its rows
    "problems": "problems",
    **dict.fromkeys(STYLES, "conversations"),
    "tool_pairs": "pairs",
    QUESTIONS: "calls",
    ANSWERS: "calls",
}


@stage_kind
@dataclass
class PracticeStage(Stage):
    kind: str = "practice"
    problems: int = count(4000)  # word problems in GSM8K's columns: problems.jsonl
    conversations: int = count(200)  # with calls, in each style: tools.jsonl, xml_tools.jsonl, python_tools.jsonl
    pairs: int = count(100)  # of conversations with calls: tool_pairs.jsonl
    calls: int = count(100)  # function-calling questions: call_questions.jsonl, call_answers.jsonl
    seed: int = seeded(0)

    VERSION = VERSION
    SCRIPT = "data_gen/practice.py"

    def file_parts(self, path):
        """A file hangs on its own number of rows alone."""
        name = path.removesuffix(".jsonl")
        return [self.seed, name, getattr(self, READ_FROM[name]), self.VERSION] if name in READ_FROM else None

    def make(self, work: Work):
        counts = {name: getattr(self, name) for name in ("problems", "conversations", "pairs", "calls")}
        rows = write_practice(work.folder, **counts, seed=self.seed)
        print("practice rows: " + ", ".join(f"{name} {number}" for name, number in rows.items()), flush=True)
        return {"rows": rows}
