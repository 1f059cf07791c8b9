"""`smolpost bench`: real settings, random weights, a few steps; nothing stays on the disk."""

import json
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest

from smolpost import recipe
from smolpost.chat.fates import Fate
from smolpost.cli import main
from smolpost.errors import UserError
from smolpost.pipeline import bench
from smolpost.pipeline.plan import plan, select_one
from smolpost.screen import console
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from smolpost.training.generated_rows import generated_rows
from tests.small import SMALL, Small, environment

SETTINGS = dict(init_from="x", data="y", learning_rate=1e-3, global_batch_size=3)


@pytest.fixture
def request_of(tmp_path, monkeypatch):
    """Words -> the request of the toy pipeline, whose data need not be there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    places = [f"data_root={tmp_path / 'data'}", f"run_dir={tmp_path / 'runs'}"]
    return lambda *words: recipe.load([*SMALL, *places, *words])


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
def test_generated_packs_are_as_the_stage_packs(packing):
    stage = SFTStage(**SETTINGS, max_seq_len=300, packing=packing)
    rows = generated_rows(stage, 9, vocab_size=50)
    assert len(rows) == 9
    for row in rows:
        lengths, fates = row["seq_lengths"], np.array(row["fates"])
        assert sum(lengths) == len(row["input_ids"]) == len(fates) <= 300 and max(row["input_ids"]) < 50
        firsts = np.cumsum([0, *lengths[:-1]])
        assert (np.flatnonzero(fates == Fate.FIRST) == firsts).all()
        assert (fates == Fate.TRAINED).sum() == sum(length // 2 for length in lengths)
        assert packing != "none" or len(lengths) == 1
        assert packing != "wrapped" or sum(lengths) == 300


def test_generated_pairs_fit():
    rows = generated_rows(APOStage(**SETTINGS, max_seq_len=100), 40, vocab_size=50)
    assert len(rows) == 40
    for row in rows:
        prompt, chosen, rejected = (len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
        assert prompt + max(chosen, rejected) <= 100
        assert not any(row["prompt_mask"]) and all(row["chosen_mask"]) and all(row["rejected_mask"])


def measured(request, tmp_path, capsys, steps=3):
    """What a rank prints, by its labels, and the log lines; in this process."""
    planned = {stage.name: stage for stage in plan(request)}
    stage = select_one(planned.values(), request.stage)
    bench._put_start(stage, planned, bench._locator(request), request, tmp_path / bench.START)
    bench._put_rows(stage, None, steps, tmp_path)
    bench.measure(request, tmp_path, steps)
    printed = capsys.readouterr().out.splitlines()
    return dict(line.split("  ", 1) for line in printed[-12:] if "  " in line and not line.startswith("{"))


@pytest.mark.parametrize("stage", ["sft", "apo"])
@pytest.mark.parametrize("engine", ["smolpost", pytest.param("trl", marks=pytest.mark.slow)])
def test_the_numbers_belong_together(request_of, tmp_path, capsys, monkeypatch, stage, engine):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = [f"stages.{stage}.engine={engine}", f"stage={stage}", "stages.apo.max_steps=null", "stages.sft.max_steps=7"]
    if engine == "trl":
        words.append("stages.apo.pack_tokens=null")
    found = measured(request_of(*words), tmp_path, capsys)
    rows = datasets.load_from_disk(str(tmp_path / bench.ROWS))
    assert len(rows) == 4 * 4  # 3 steps and 1 to warm up
    speed = float(found["tokens/s"].strip().replace(",", ""))
    seconds = float(found["seconds per step"])
    if stage == "sft":
        tokens = sum(map(len, rows["input_ids"])) / 4
        assert speed * seconds == pytest.approx(tokens, rel=0.25)  # a step's; steps differ
        assert found["the stage"].strip().startswith("7 steps")
    else:
        assert "are not prepared" in found["a billion tokens"]
        assert ("reference" in found) == (engine == "smolpost")
    (rate,) = json.loads((tmp_path / "smolpost" / "matmul.json").read_text()).values()
    share = float(found["needed TFLOP/s"].split()[0]) / rate
    assert float(found["share of matmul rate"].split("%")[0]) == pytest.approx(100 * share, abs=0.1)


def test_a_prepared_stage_lends_its_rows_and_is_estimated(request_of, tmp_path, monkeypatch):
    stage = select_one(plan(request_of()), "sft")
    own = generated_rows(stage.config, 40, vocab_size=50)
    own.save_to_disk(str(tmp_path / "own"))
    monkeypatch.setattr(bench.manifest, "read", lambda folder: {"kind": "prepared"})
    located = type("Located", (), {"prepared": tmp_path / "own"})
    before = sorted(tmp_path.rglob("*"))
    bench._put_rows(stage, located, 3, tmp_path)
    assert [file for file in (tmp_path / "own").rglob("*") if file not in before] == []
    assert json.loads((tmp_path / bench.KNOWN_ROWS).read_text())["number"] == 40
    taken = datasets.load_from_disk(str(tmp_path / bench.ROWS))
    assert taken["input_ids"][:] == own.select([i * 40 // 16 for i in range(16)])["input_ids"][:]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["stage=init"],
            "stage=init of kind init cannot be measured; choose a stage that trains on documents or pairs",
        ),
        (["stage=sft", "accelerate.num_machines=2"], "accelerate.num_machines=2, but bench measures one machine"),
        ([], "no stage given"),
    ],
)
def test_what_cannot_be_measured_is_said(request_of, words, said):
    with pytest.raises(UserError, match=said):
        bench.bench(request_of(*words), 3, console())


@pytest.mark.parametrize("steps", ["0", "-1", "x", "", "2.5"])
def test_steps_are_a_count(capsys, steps):
    with pytest.raises(SystemExit) as end:
        main(["bench", "pipeline=tiny", "stage=sft", f"steps={steps}"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"smolpost: steps={steps} is not a number of optimizer steps")


@pytest.mark.slow
def test_nothing_stays_on_the_disk(tmp_path):
    (scratch := tmp_path / "scratch").mkdir()
    done = Small(tmp_path).smolpost("bench", "stage=sft", "steps=2", env=environment() | {"TMPDIR": str(scratch)})
    assert done.returncode == 0, done.stderr
    assert "2 steps after 1 to warm up" in done.stdout
    assert sorted(Path(tmp_path).iterdir()) == [scratch] and not any(scratch.iterdir())
