"""results.json: all finished stages of the pipeline, whatever stage the last run was for."""

import json

import pytest

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.evaluation import results
from smolpost.pipeline import manifest, run
from smolpost.pipeline.lineage import Lineage
from smolpost.screen import console
from tests.small import Small


class Run:
    """`smolpost run` whose commands finish their folders at once."""

    def __init__(self, folder, monkeypatch):
        small = Small(folder)
        small.write_data()
        self.words, self.file = small.words, folder / "runs" / "gsm8k" / "results.json"
        monkeypatch.setattr(run, "execute", self.execute)
        monkeypatch.setattr(run, "check_measurable", lambda lineage, stage: None)  # there is no tokenizer

    def __call__(self, *more) -> dict:
        self.more = more
        assert run.run(recipe.load([*self.words, *more]), console()) == 0
        return json.loads(self.file.read_text())

    def lineage(self, *more) -> Lineage:
        return Lineage(recipe.load([*self.words, *more]))

    def execute(self, command, console, variables):
        lineage = self.lineage(*self.more)
        stage = lineage.stages[command[-1].removeprefix("stage=")]
        if command[1] == "eval":
            for task, folder in stage.evaluation.items():
                folder.mkdir(parents=True)
                (folder / results.SCORES).write_text(json.dumps({"scores": {}, "task": task, "seconds": 1.0}))
        elif command[1] != "prepare":
            config = stage.config
            fields = {"stage": stage.name, "kind": config.kind, "config": stage.config, "parents": {}}
            stage.folder.mkdir(parents=True)
            manifest.write(stage.folder, key=stage.key, seconds=1.0, **json.loads(json.dumps(fields, default=vars)))
        return 0


@pytest.fixture
def run_it(tmp_path, monkeypatch):
    return Run(tmp_path, monkeypatch)


def test_a_run_of_one_stage_leaves_the_others_in_the_file(run_it):
    whole = run_it()
    names = list(run_it.lineage().stages)
    assert list(whole["stages"]) == names
    final = whole["stages"][names[-1]]["folder"]
    assert whole["final_model"] == final
    for name in ("init", "sft"):
        assert run_it(f"stage={name}") == whole


def test_stages_whose_key_has_changed_leave_the_file(run_it):
    whole = run_it()
    changed = "stages.sft.learning_rate=0.5"
    found = run_it("stage=sft", changed)
    lineage = run_it.lineage(changed)
    stale = {name for name, stage in lineage.stages.items() if stage.key != whole["stages"][name]["key"]}
    assert "sft" in stale and "init" not in stale
    assert found["stages"].keys() == whole["stages"].keys() - (stale - {"sft"})
    assert found["stages"]["sft"]["key"] == lineage.stages["sft"].key
    assert found["stages"]["init"] == whole["stages"]["init"]
    models = [stage["folder"] for stage in found["stages"].values() if stage["kind"] != "tasks"]
    assert found["final_model"] == models[-1]


def test_scores_stay_where_a_later_run_measures_nothing(run_it):
    measured = run_it("evaluation=gsm8k")
    assert (
        measured["stages"]["sft"]["evaluation"].keys()
        == run_it.lineage("evaluation=gsm8k").stages["sft"].evaluation.keys()
    )
    assert run_it("stage=sft") == measured


def test_a_file_of_another_kind_is_replaced(run_it):
    whole = run_it()
    for content in ("", "[]", '{"stages": 3}'):
        run_it.file.write_text(content)
        assert run_it("stage=init") == whole


def test_results_under_other_keys_are_one_line(run_it, monkeypatch):
    """As where the code is edited while a run goes on: the command then makes a folder that this run does not know."""
    monkeypatch.setattr(run, "execute", lambda *_: 0)
    with pytest.raises(
        UserError, match=r"^stage init: its commands ended well, but .*init-\w+ is not finished: code, "
    ):
        run_it()
    assert not run_it.file.exists()
