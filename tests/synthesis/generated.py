"""A user's pipeline with one generation stage, made in this process by a fake teacher."""

import json
from collections.abc import Callable
from pathlib import Path

from smolpost import recipe
from smolpost.pipeline import manifest, steps
from smolpost.pipeline.lineage import Lineage
from smolpost.stages.generation import GenerationStage
from tests.synthesis.fakes import FakeEngine

HEAD = """# @package _global_
defaults:
  - /model: tiny
  - /accelerate: single
  - /stage@stages.made: {kind}
  - _self_
pipeline: mine
data:
  prompts:
    shuffle: false
    sources:
      sums: {{path: {rows}}}
stages:
  made:
"""


class Generated:
    """The pipeline.

    Args:
        settings: Of the stage, as YAML lines without indent.
        replies: Role -> reply function of its `FakeEngine`.
    """

    def __init__(self, folder: Path, monkeypatch, kind: str, rows: list[dict], settings: str, **replies: Callable):
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.file = folder / "mine.yaml"
        lines = "".join(f"    {line}\n" for line in settings.strip().splitlines())
        self.file.write_text(HEAD.format(kind=kind, rows=self.rows) + lines)
        self.words = [f"pipeline={self.file}", f"run_dir={folder / 'runs'}"]
        self.engines = {role: FakeEngine(reply) for role, reply in replies.items()}
        monkeypatch.setattr(GenerationStage, "engine", lambda stage, role, work: self.engines[role])

    def located(self, *words: str):
        lineage = Lineage(recipe.load([*self.words, *words]))
        return lineage, lineage.stages["made"]

    def make(self, *words: str) -> Path:
        return steps.make(*self.located(*words))

    def asked(self, role: str = "teacher") -> list:
        return self.engines[role].asked

    def made(self, *words: str) -> tuple[list[dict], dict]:
        """The rows, as a training stage would read them, and the stage's report."""
        from smolpost.data.sources import read_rows
        from smolpost.schema import Source

        folder = self.make(*words)
        rows = [dict(row) for _, row in read_rows(Source(path=str(folder / "rows.parquet")))]
        return rows, manifest.read(folder)["report"]
