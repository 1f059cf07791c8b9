"""Merge stages of a recipe beside the linear one: mergekit's methods, its YAML files, greedy soups."""

import json

import pytest
import torch
from safetensors.torch import load_file

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.pipeline import manifest
from tests.small import Small

TWO = [  # random weights of two seeds stand for two checkpoints
    "+schema@stages.other=init", "stages.other.seed=1", "stages.other.tokenizer_data=[mid,sft,preference]",
    "stages.other.template=smollm3", "stages.other.vocab_size=400",
]  # fmt: skip
SLERP = [
    *TWO, "+schema@stages.slerp=mergekit", "stages.slerp.method=slerp", "stages.slerp.base=init",
    "stages.slerp.base_model=init", "+stages.slerp.inputs.init={}", "+stages.slerp.inputs.other={}",
    "+stages.slerp.parameters.t=0.3",
]  # fmt: skip
GREEDY = [
    *TWO, "+schema@evaluation.tasks.loss=perplexity", "+schema@stages.greedy=greedy",
    "stages.greedy.inputs=[init,other]", "stages.greedy.base=init", "stages.greedy.metrics=[-loss/no_think]",
    "evaluation.tasks.loss.max_rows=4", "data.heldout.sources.gsm8k.first_row=100",
]  # fmt: skip

AVERAGE = [
    "stages.sft.snapshot_steps=4", "+schema@stages.average=merge", "+stages.average.inputs.sft=1",
    "stages.average.base=sft", "stages.average.average=ema", "stages.average.ema_decay=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    small = Small(tmp_path_factory.mktemp("merges"))
    small.write_data()
    return small


def finished(project, stage, *words):
    """Folder of the stage after `smolpost run`, and what was printed."""
    done = project.smolpost("run", *words, f"stage={stage}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return project.folder_of(stage, *words), done.stdout


def weights(project, words, *stages):
    return [load_file(project.folder_of(stage, *words) / "model.safetensors") for stage in stages]


def test_a_method_of_mergekits_by_name(project):
    folder, _ = finished(project, "slerp", *SLERP)
    report = manifest.read(folder)["report"]
    assert report["method"] == "slerp" and report["base"] == "init"
    merged, one, two = weights(project, SLERP, "slerp", "init", "other")
    name = "model.layers.0.mlp.up_proj.weight"
    a, b = one[name].double().flatten(), two[name].double().flatten()
    angle = torch.arccos(torch.dot(a, b) / (a.norm() * b.norm()))
    expected = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
    torch.testing.assert_close(merged[name].double().flatten(), expected, atol=1e-6, rtol=1e-5)


def test_a_mergekit_yaml_as_it_is(project, tmp_path):
    file = tmp_path / "merge.yml"
    file.write_text(
        "merge_method: linear\nmodels:\n  - model: init\n    parameters: {weight: 0.25}\n"
        "  - model: other\n    parameters: {weight: 0.75}\ndtype: float32\n"
    )
    words = [*TWO, "+schema@stages.yaml=mergekit", f"stages.yaml.config={file}", "stages.yaml.base=other"]
    words += ["+stages.yaml.inputs.init={}", "+stages.yaml.inputs.other={}"]
    finished(project, "yaml", *words)
    merged, one, two = weights(project, words, "yaml", "init", "other")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.25 * one[name] + 0.75 * two[name], atol=1e-7, rtol=1e-6)
    before = project.folder_of("yaml", *words)
    file.write_text(file.read_text().replace("0.25", "0.5").replace("0.75", "0.5"))
    assert project.folder_of("yaml", *words) != before  # the file's content is in the key


def test_a_greedy_soup_keeps_what_helps(project):
    folder, output = finished(project, "greedy", *GREEDY)
    report = json.loads((folder / "greedy.json").read_text())
    assert set(report["kept"]) <= {"init", "other"} and "arXiv:2203.05482" in output
    first = report["alone"][0]
    assert first["value"] == max(candidate["value"] for candidate in report["alone"])
    [trial] = report["trials"]
    assert trial["kept"] == (trial["value"] >= first["value"])
    merged, *parts = weights(project, GREEDY, "greedy", *report["kept"])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, sum(part[name] for part in parts) / len(parts), atol=1e-7, rtol=1e-6)


def test_the_average_along_a_run(project):
    folder, _ = finished(project, "average", *AVERAGE)
    inputs = {name: round(7 * weight) for name, weight in manifest.read(folder)["report"]["inputs"].items()}
    assert inputs == {"sft@4": 1, "sft@8": 2, "sft": 4}  # of twelve steps, in sevenths
    merged, final = weights(project, AVERAGE, "average", "sft")
    kept = project.folder_of("sft", *AVERAGE) / "snapshots"
    first, second = (load_file(kept / f"step-{step}" / "model.safetensors") for step in (4, 8))
    assert any(not torch.equal(first[name], final[name]) for name in final)
    for name, tensor in merged.items():
        mean = (first[name].double() + 2 * second[name].double() + 4 * final[name].double()) / 7
        torch.testing.assert_close(tensor.double(), mean, atol=2e-7, rtol=1e-7)
    # The last two alone: the run is not trained again.
    trained = (kept.parent / "manifest.json").stat().st_mtime_ns
    again, _ = finished(project, "average", *AVERAGE, "stages.average.average=lawa", "stages.average.average_last=2")
    assert again != folder and (kept.parent / "manifest.json").stat().st_mtime_ns == trained
    assert manifest.read(again)["report"]["inputs"] == {"sft@8": 0.5, "sft": 0.5}


def test_settings_that_make_no_merge_are_refused(project):
    for words, message in [
        (["stages.slerp.method=null"], "stages.slerp needs a method of mergekit's or a config"),
        (["stages.slerp.base=sft"], "stages.slerp.base=sft is not an input of the stage; choose one of: init, other"),
        (["stages.slerp.method=null", "stages.slerp.config=none.yml"], "config=none.yml states parameters and"),
    ]:
        with pytest.raises(UserError, match=message):
            recipe.load([*project.words, *SLERP, *words])
    with pytest.raises(UserError, match=r"stages.greedy.metrics=lost/think is not TASK/METRIC with a task of"):
        recipe.load([*project.words, *GREEDY, "stages.greedy.metrics=[lost/think]"])
