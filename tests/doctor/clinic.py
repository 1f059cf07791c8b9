"""The toy pipeline for the doctor: a healthy miniature whose files a test may spoil."""

import json
from pathlib import Path

from smolpost import recipe
from smolpost.chat.render import load_template
from smolpost.doctor.checks import Check, diagnose
from smolpost.pipeline.lineage import Lineage
from tests.small import Small, as_written, sum_rows

ASK = {"role": "user", "content": "What is 6*7?"}
CALL = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"function": {"name": "mul", "arguments": {}}}]}
TURNS = [
    ASK, {"role": "assistant", "content": "<think>\nSix sevens.\n</think>\n42."},
    {"role": "user", "content": "And 6*8?"}, {"role": "assistant", "content": "<think>\nSix more.\n</think>\n48."},
]  # fmt: skip
TOOLS = [ASK, CALL, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42."}]
NO_THINK = {"enable_thinking": False}


def conversations() -> list[dict]:
    rows = [
        {"messages": row["chosen"], "chat_template_kwargs": {"enable_thinking": row["think"]}} for row in sum_rows(8, 1)
    ]
    return [*rows, {"messages": TURNS}, {"messages": TOOLS, "chat_template_kwargs": NO_THINK}]


def pairs() -> list[dict]:
    rows = [
        {key: row[key] for key in ("chosen", "rejected")} | {"chat_template_kwargs": {"enable_thinking": row["think"]}}
        for row in sum_rows(8, 2)
    ]
    wrong = [*TOOLS[:-1], {"role": "assistant", "content": "It is 40 or so."}]
    return [*rows, {"chosen": TOOLS, "rejected": wrong, "chat_template_kwargs": NO_THINK}]


# The tokenizer comes from other rows than those under examination, so spoiling these changes no key.
LIGHT = ["stages.init.tokenizer_data=[mid]", "model.architecture.num_hidden_layers=2"]


class Clinic(Small):
    """The toy pipeline with an untrained start checkpoint, whose files a test may spoil."""

    def write(self, name: str, rows: list[dict]) -> None:
        file = self.folder / "data" / f"smoltalk2_{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def lineage(self, *more: str) -> Lineage:
        return Lineage(recipe.load([*self.words, *LIGHT, *more]))

    @property
    def start(self) -> Path:
        return self.lineage().stages["init"].folder

    def diagnose(self, stage: str, *more: str, rows: int = 16) -> dict[str, Check]:
        lineage = self.lineage(*more)
        as_written(lineage.stages["init"].folder)  # what a test has spoilt is what the folder was finished with
        return {check.name: check for check in diagnose(lineage, lineage.stages[stage], rows=rows)}

    def template(self, *changes: tuple[str, str]) -> str:
        """Path of smollm3's template with some text replaced, as an override of the sft stage."""
        text = load_template("smollm3")
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        file = self.folder / "spoilt.jinja"
        file.write_text(text)
        return f"template={file}"


def failed(found: dict[str, Check]) -> set[str]:
    assert all(check.remedy for check in found.values() if check.status == "fail")
    return {name for name, check in found.items() if check.status == "fail"}
