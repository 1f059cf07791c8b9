"""A word of the command line means one model, or it is refused in a line that says what would do."""

import json

import pytest

from smolpost.errors import UserError
from smolpost.pipeline.models import NamedModel, finished_folder, model_named


def made(root, pipeline: str, stage: str, key: str, finished: str, model: bool = True):
    folder = root / pipeline / f"{stage}-{key}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"stage": stage, "key": key, "finished": finished}))
    if model:
        (folder / "config.json").write_text("{}")
    return folder


def test_a_url_and_a_folder_are_what_they_say(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert model_named("http://localhost:8000/v1/", []) == NamedModel(
        "http://localhost:8000/v1/", None, "http://localhost:8000/v1"
    )
    assert model_named(str(tmp_path), []).folder == tmp_path
    with pytest.raises(UserError, match="/nowhere does not exist; name a checkpoint folder, a stage, or the URL"):
        model_named(f"{tmp_path}/nowhere", [])
    with pytest.raises(UserError, match=r"config\.json is a file; name a checkpoint folder, a stage, or the URL"):
        model_named(f"{tmp_path}/config.json", [])
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"data has no config\.json, so it is not a checkpoint"):
        model_named(f"{tmp_path}/data", [])


def test_a_stage_is_the_newest_finished_model_of_its_name(tmp_path):
    words = [f"run_dir={tmp_path}"]
    made(tmp_path, "mine", "sft", "b1", "2026-01-01T00:00:00+00:00")
    newest = made(tmp_path, "mine", "sft", "a2", "2026-02-01T00:00:00+00:00")
    made(tmp_path, "mine", "sft-2", "a3", "2026-03-01T00:00:00+00:00")
    made(tmp_path, "other", "sft", "a4", "2026-03-01T00:00:00+00:00", model=False)
    (tmp_path / "mine" / "sft-ff").mkdir()
    (tmp_path / "mine" / "sft-ff" / "config.json").write_text("{}")  # not finished
    assert model_named("sft", words).folder == newest
    with pytest.raises(UserError, match=r"no run under .* has a finished model of that name"):
        model_named("apo", words)
    made(tmp_path, "other", "sft", "a5", "2026-03-01T00:00:00+00:00")
    with pytest.raises(UserError, match=r"several runs under .*; add pipeline=mine or pipeline=other"):
        model_named("sft", words)


def test_a_stage_of_a_pipeline_must_make_a_model_and_be_finished(tmp_path):
    words = ["pipeline=tiny", f"run_dir={tmp_path}"]
    with pytest.raises(UserError, match="pairs makes no model; choose one of: base, long_context, mid, sft"):
        model_named("pairs", words)
    with pytest.raises(UserError, match="stage sft is not finished"):
        model_named("sft", words)
    with pytest.raises(UserError, match="sfft"):
        model_named("sfft", words)


def test_a_finished_folder_is_of_any_kind(tmp_path):
    words = [f"run_dir={tmp_path}"]
    rows = made(tmp_path, "mine", "traces", "t1", "2026-01-01T00:00:00+00:00", model=False)
    assert finished_folder("traces", words) == rows == finished_folder(str(rows), [])
    with pytest.raises(UserError, match=r"nothing is not a folder, and no run under .* has a finished stage"):
        finished_folder("nothing", words)
    with pytest.raises(UserError, match="stage tasks is not finished"):
        finished_folder("tasks", ["pipeline=tiny", *words])
