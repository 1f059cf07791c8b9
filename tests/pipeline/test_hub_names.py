"""A pipeline's names on the Hub: keys and downloads by the commit that it first used."""

from types import SimpleNamespace

import pytest

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.files import write_json
from smolpost.hub import Commits
from smolpost.pipeline.lineage import HUB, Lineage
from smolpost.pipeline.steps import input_folders

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def words(tmp_path):
    """The published recipe, whose base checkpoint and data are on the Hub."""
    return ["pipeline=smollm3", f"run_dir={tmp_path}/runs", "model.checkpoint=org/base", "model.revision=v1"]


@pytest.fixture
def hub(monkeypatch):
    """What stands on the Hub, by name, and the questions that were asked: (kind, name, revision)."""
    hub = SimpleNamespace(commits={}, asked=[])

    def looked_up(kind, name, revision):
        hub.asked.append((kind, name, revision))
        return hub.commits.get(name, FIRST)

    monkeypatch.setattr("smolpost.hub._looked_up", looked_up)
    return hub


def keys(words, **options):
    return {name: stage.key for name, stage in Lineage(recipe.load(words), **options).stages.items()}


def test_a_plan_asks_nobody_and_a_run_asks_once(words, hub):
    before = keys(words)
    assert hub.asked == []
    made = keys(words, look_up=True)
    assert sorted(hub.asked) == [("dataset", "HuggingFaceTB/smoltalk2", "main"), ("model", "org/base", "v1")]
    assert not set(before.values()) & set(made.values())
    hub.commits.update({"org/base": SECOND, "HuggingFaceTB/smoltalk2": SECOND})  # the branches move on
    assert keys(words) == keys(words, look_up=True) == made
    assert len(hub.asked) == 2


def test_the_commit_decides_keys_and_downloads_whatever_it_was_called(words, hub, monkeypatch):
    lineage = Lineage(recipe.load(words), look_up=True)
    mid = lineage.stages["mid"]
    [revision] = {source.revision for source in mid.data["mid"].sources.values()}
    assert revision == FIRST
    fetched = []
    monkeypatch.setattr(
        "smolpost.model.loading.snapshot_download",
        lambda name, **given: fetched.append((name, given["revision"])) or "x",
    )
    input_folders(lineage, mid)
    assert fetched == [("org/base", FIRST)]
    named = [*words[:-1], f"model.revision={FIRST}"]
    assert keys(named, look_up=True) == keys(words, look_up=True)
    assert keys([*words[:-1], f"model.revision={SECOND}"], look_up=True)["mid"] != mid.key


def test_plan_shows_the_commits(words, hub, capsys, tmp_path):
    from smolpost import screen
    from smolpost.pipeline import run

    def shown():
        run.describe(recipe.load(words), screen.console())
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("on the Hub: ")]

    assert shown() == [
        "on the Hub: HuggingFaceTB/smoltalk2@main = (looked up when first used)",
        "on the Hub: org/base@v1 = (looked up when first used)",
    ]
    Commits(tmp_path / "runs" / "smollm3" / HUB).resolve("model", "org/base", "v1")
    assert shown()[1] == "on the Hub: org/base@v1 = 1111111"


def test_without_a_hub_the_line_has_the_remedy(words, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"^model org/base@v1: its commit is not known here, .* as its revision$"):
        keys(words, look_up=True)
    assert len(keys(words)) == 6
    entries = {"model org/base@v1": {"commit": FIRST}, "dataset HuggingFaceTB/smoltalk2@main": {"commit": SECOND}}
    write_json(tmp_path / "runs" / "smollm3" / HUB, entries)
    assert keys(words, look_up=True) == keys(words)
