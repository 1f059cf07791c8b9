"""Stages that stand for released checkpoints, and `pipeline=smollm3_from_release` in miniature."""

import json
import shutil
import sys

import pytest
from safetensors.torch import load_file

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.files import hashes
from smolpost.pipeline import manifest, steps
from smolpost.pipeline.lineage import Lineage
from tests.small import Small, call, sum_rows

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Three finished checkpoints, which stand for SFT, the soup and the base model; and the rows beside them."""
    folder = tmp_path_factory.mktemp("released")
    small = Small(folder)
    small.write_data()
    with open(folder / "choose.jsonl", "w") as file:
        file.writelines(json.dumps({"messages": row["chosen"], "source": "sums"}) + "\n" for row in sum_rows(8, 5))
    for seed, name in enumerate(("sft", "soup", "base")):
        words = [*small.words, f"stages.init.seed={seed}", "stages.init.tokenizer_data=[sft]"]
        lineage = Lineage(recipe.load(words))
        shutil.copytree(steps.make(lineage, lineage.stages["init"]), folder / name)
    return folder


def words(released, run_dir):
    """The pipeline with folders in place of Hub names, and sizes for a second."""
    sources = ("OpenThoughts3_1_2M_think", "OpenThoughts3_1_2M_no_think_no_think")
    rows = [
        word
        for source in sources
        for word in (
            f"data.choose.sources.{source}.path={released}/choose.jsonl",
            f"data.choose.sources.{source}.subset=null",
            f"data.choose.sources.{source}.split=train",
        )
    ]
    return [
        "pipeline=smollm3_from_release", "data=gsm8k_folder", f"data_root={released}/data", f"run_dir={run_dir}", *rows,
        f"model.checkpoint={released}/base", f"stages.sft.checkpoint={released}/sft", "stages.sft.revision=null",
        f"stages.soup.checkpoint={released}/soup", "stages.soup.revision=null",
        "stages.apo.max_seq_len=1024", "stages.apo.global_batch_size=4", "stages.apo.max_steps=2",
        "stages.apo.learning_rate=1e-3", "stages.apo.logging_steps=1",
        "~evaluation.tasks.loss", "~evaluation.tasks.pairs", "evaluation.tasks.answer.stages=null",
        "evaluation.tasks.answer.max_new_tokens=4", "evaluation.tasks.answer.answer=pattern",
        "evaluation.tasks.answer.answer_pattern='([0-9]+)[.]$'", "evaluation.tasks.choose.max_rows=4",
        "evaluation.tasks.ruler.lengths=[512]", "evaluation.tasks.ruler.tasks=[niah_single_1]",
        "evaluation.tasks.ruler.num_prompts=2", "evaluation.batch_tokens=4096",
        "stages.sweep.long=[ruler/512]", "stages.sweep.weights=[0.1]", "stages.sweep.dtype=float32",
        "stages.merge.dtype=float32",
    ]  # fmt: skip


@pytest.fixture
def hub(monkeypatch, released):
    """Revision -> (commit, folder of what the Hub's cache would have)."""
    revisions = {"it-SFT": (FIRST, released / "sft"), "it-soup-APO": (SECOND, released / "soup")}
    monkeypatch.setattr("smolpost.hub._looked_up", lambda kind, name, revision: revisions.get(revision, (FIRST,))[0])
    folders = {commit: folder for commit, folder in revisions.values()}
    monkeypatch.setattr("smolpost.model.loading.snapshot_download", lambda name, revision, **_: folders[revision])
    return revisions


def test_it_plans_without_a_network():
    lineage = Lineage(recipe.load(["pipeline=smollm3_from_release"]))
    assert [stage.config.kind for stage in lineage.stages.values()] == [
        "released", "apo", "released", "merge", "sweep",
    ]  # fmt: skip
    assert [name for name in lineage.hub_names() if "checkpoints" in name] == [
        f"HuggingFaceTB/SmolLM3-3B-checkpoints@{revision} = (looked up when first used)"
        for revision in ("it-SFT", "it-soup-APO")
    ]
    assert lineage.stages["merge"].inputs["soup"][1] == 0.9
    assert lineage.recipe.accelerate["num_processes"] == 1


def test_the_commit_is_the_key_whatever_it_was_called(tmp_path, hub):
    def key(stage, *more):
        found = recipe.load(["pipeline=smollm3_from_release", f"run_dir={tmp_path}", *more])
        return Lineage(found, look_up=True).stages[stage].key

    named = key("sft")
    assert named == key("sft", f"stages.sft.revision={FIRST}") != key("sft", f"stages.sft.revision={SECOND}")
    assert key("apo") == key("apo", f"stages.sft.revision={FIRST}") != key("apo", f"stages.sft.revision={SECOND}")
    shown = Lineage(recipe.load(["pipeline=smollm3_from_release", f"run_dir={tmp_path}"])).hub_names()
    assert "HuggingFaceTB/SmolLM3-3B-checkpoints@it-SFT = 1111111" in shown


def test_its_folder_has_the_released_files_and_outlives_their_cache(tmp_path, hub, released):
    cache = tmp_path / "cache"
    (cache / "blobs").mkdir(parents=True)
    for file in (released / "sft").iterdir():  # the Hub's cache: links to blobs
        if file.is_file() and file.name != "manifest.json" and not file.name.startswith("."):
            shutil.copy(file, cache / "blobs" / file.name)
            (cache / file.name).symlink_to(cache / "blobs" / file.name)
    (cache / "pytorch_model.bin").write_bytes(b"not for us")
    hub["it-SFT"] = (FIRST, cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smolpost.model.loading.snapshot_download", lambda *_, **__: cache)
        lineage = Lineage(
            recipe.load(["pipeline=smollm3_from_release", f"run_dir={tmp_path}/runs", "stage=sft"]), look_up=True
        )
        folder = steps.make(lineage, lineage.stages["sft"])
    weights = folder / "model.safetensors"
    assert weights.stat().st_ino == (cache / "blobs" / weights.name).stat().st_ino and not weights.is_symlink()
    assert not (folder / "pytorch_model.bin").exists()
    shutil.rmtree(cache)
    assert hashes(folder) == manifest.read(folder)["files"]
    assert load_file(weights).keys() == load_file(released / "sft" / "model.safetensors").keys()
    lineage.require("sft")


@pytest.mark.parametrize("value", ["/nowhere/x", "./x", "a/b/c", "''", "'~/models'"])
def test_a_name_that_cannot_be_one_is_refused_before_anything(value):
    with pytest.raises(UserError, match=r"stages\.sft\.checkpoint=.* is neither a folder nor a Hub id; name one of"):
        recipe.load(["pipeline=smollm3_from_release", f"stages.sft.checkpoint={value}"])


def make(*given):
    lineage = Lineage(recipe.load([*given]))
    return steps.make(lineage, lineage.stages["sft"])


def test_a_folder_that_is_not_whole_is_one_line_and_leaves_nothing(released, tmp_path):
    given, bare = words(released, tmp_path / "runs"), tmp_path / "bare"
    shutil.copytree(released / "sft", bare)
    given.append(f"stages.sft.checkpoint={bare}")
    (bare / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=rf"^stages\.sft\.checkpoint={bare} has no manifest.json: .*smolpost adopt"):
        make(*given)
    shutil.move(tmp_path / "manifest.json", bare)
    with open(bare / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match="is not the file that was written"):
        make(*given)
    (bare / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        make(*given)
    assert not list((tmp_path / "runs").glob("*/sft-*"))


def test_training_from_it_needs_its_template(released, tmp_path):
    lineage = Lineage(recipe.load([*words(released, tmp_path / "runs"), "stages.apo.allow_template_change=false"]))
    steps.make(lineage, lineage.stages["sft"])
    with pytest.raises(UserError) as error:
        steps.prepare(lineage, lineage.stages["apo"])
    assert str(error.value).startswith("stages.apo.template=smollm3_published (hash ")
    assert "is not the chat template of sft (hash " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_apo_from_a_released_sft_and_a_sweep_from_a_released_soup(released, tmp_path):
    given = words(released, tmp_path / "runs")
    done = call([sys.executable, "-m", "smolpost.cli", "run", *given])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lineage = Lineage(recipe.load(given))
    folders = {name: stage.folder for name, stage in lineage.stages.items()}
    assert all(stage.finished() for stage in lineage.stages.values())
    soup, base, merged = (
        load_file(folder / "model.safetensors") for folder in (released / "soup", released / "base", folders["merge"])
    )
    for name, tensor in merged.items():
        assert (tensor - (0.9 * soup[name] + 0.1 * base[name])).abs().max() < 1e-6
    report = json.loads((folders["sweep"] / "sweep.json").read_text())
    assert [point["weights"] for point in report["points"]][:2] == [
        {"soup": 1.0, "checkpoint": 0.0}, {"soup": 0.9, "checkpoint": 0.1},
    ]  # fmt: skip
    before, after = (load_file(folder / "model.safetensors") for folder in (released / "sft", folders["apo"]))
    assert any((after[name] - before[name]).abs().max() > 1e-5 for name in before)
    log = [entry for entry in manifest.read(folders["apo"])["report"]["log"] if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(1.0, abs=1e-6)  # the policy is the reference, so apo_zero is 1
