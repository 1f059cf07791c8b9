"""What a run says above a stage and at its end: nothing cut, and only what exists."""

import io
import json

import pytest
from rich.console import Console

from smolpost import recipe
from smolpost.pipeline.lineage import Lineage
from smolpost.pipeline.run import _pictures, heading

ROW = {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]}
PAIR = {"chosen": ROW["messages"], "rejected": ROW["messages"]}


@pytest.fixture
def lineage(tmp_path):
    for name, row in (("mid", ROW), ("sft", ROW), ("preference", PAIR)):
        (tmp_path / f"smoltalk2_{name}.jsonl").write_text(json.dumps(row) + "\n")
    return Lineage(
        recipe.load(["pipeline=gsm8k", "data=gsm8k_folder", f"data_root={tmp_path}", f"run_dir={tmp_path}/my runs"])
    )


def test_plots_and_training_curves_are_named_where_they_are(lineage):
    assert _pictures(lineage, list(lineage.stages)) == []
    sft, mid, root = lineage.stages["sft"].folder, lineage.stages["mid"].folder, lineage.root
    (sft / "runs" / "today").mkdir(parents=True)
    (sft / "runs" / "today" / "events.out.tfevents.1").touch()
    for folder in (mid, sft):
        (root / "evaluations" / folder.name).mkdir(parents=True)
        (root / "evaluations" / folder.name / "ruler.png").touch()
    (sft / "pareto.png").touch()
    assert _pictures(lineage, ["mid", "sft"]) == [
        f"plots: {sft}/pareto.png, {root}/evaluations/*/ruler.png",
        f"training curves: `tensorboard --logdir '{root}'`",
    ]
    assert _pictures(lineage, ["mid"]) == [f"plots: {root}/evaluations/*/ruler.png"]


@pytest.mark.parametrize("reason", ["new", "changed: learning_rate 0.001 -> 0.0001 (sft-67db66e55ebb is kept)"])
def test_the_line_above_a_stage_is_never_cut(reason):
    console = Console(file=io.StringIO(), width=60)
    heading(f"2/2 sft: run, about 12 min left ({reason})", console)
    [line] = console.file.getvalue().splitlines()
    assert line.startswith(f"2/2 sft: run, about 12 min left ({reason})")
