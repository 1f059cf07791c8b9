"""A model that is measured on rows of a later stage is measured once they are there, and no sooner."""

import io

from rich.console import Console

from smolpost import recipe
from smolpost.files import write_json
from smolpost.pipeline import run
from smolpost.pipeline.lineage import Lineage

SCORE = {"value": 0.5, "low": 0.5, "high": 0.5, "n": 1}


def test_evaluations_wait_for_the_stages_that_write_their_rows(tmp_path, monkeypatch):
    words = ["pipeline=tiny", f"run_dir={tmp_path}"]
    lineage, done = Lineage(recipe.load(words)), []

    def execute(command, console, variables):
        """Leave what the command would: a manifest, or scores."""
        stage = lineage.stages[command[-1].removeprefix("stage=")]
        if command[:2] == ("smolpost", "eval"):
            assert all(lineage.stages[name].finished() for name in lineage.measured_on(stage.name))
            for folder in stage.evaluation.values():
                write_json(folder / "scores.json", {"scores": {"think": SCORE}, "notes": {}})
        elif command == stage.making[-1]:
            write_json(stage.folder / "manifest.json", {"key": stage.key, "kind": stage.config.kind, "seconds": 1})
        done.append((command[1] if command[0] == "smolpost" else command[0], stage.name))
        return 0

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "check_measurable", lambda lineage, stage: None)  # there are no tokenizers and rows
    assert lineage.measured_on("sft") == {"tasks", "heldout_pairs"} and lineage.measured_on("base") == {"tasks"}
    console = Console(file=io.StringIO(), width=120)
    assert run.run(recipe.load([*words, "stage=sft"]), console) == 0
    assert done.index(("eval", "base")) < done.index(("prepare", "long_context"))
    assert done[-3:] == [("accelerate", "sft"), ("python", "heldout_pairs"), ("eval", "sft")]
    assert ("python", "pairs") not in done  # not needed
    assert run.run(recipe.load(words), console) == 0
    assert len(done) == len(set(done)) == sum(len(stage.commands) for stage in lineage.stages.values())
    assert run.run(recipe.load(words), console) == 0 and len(done) == len(set(done))
