"""A finished model at a target: its files, a manifest without local paths, and a card of recorded numbers."""

import json
import os
import re

import fsspec
import pytest
import yaml
from transformers import AutoModelForCausalLM

from smolpost.cli import main
from smolpost.errors import UserError
from smolpost.files import MANIFEST, hashes, read_json, verify, write_json
from smolpost.pipeline import steps
from smolpost.publish import filesystems
from smolpost.publish.model import without_paths
from smolpost.publish.push import package, place_of
from smolpost.publish.push import push as put
from smolpost.publish.targets import PUSHED
from tests.char_model import char_model, char_tokenizer
from tests.publish.test_push import hub  # noqa: F401  a fixture

LEDGER = {"sources": {"a|b": {"rows_kept": 1200, "tokens_read": 9000, "tokens_trained": 4500}}}
MID = {"kind": "sft", "stage": "mid", "key": "m1", "parents": {"checkpoint": "org/base@" + "0" * 40}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("checkpoint"), char_tokenizer()
    char_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def stage(checkpoint, tmp_path, monkeypatch):
    """runs/p/sft-k1, which comes from mid, which comes from the Hub."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "p" / "sft-k1"
    (folder / "checkpoint-10").mkdir(parents=True)
    (folder / "runs").mkdir()
    (folder / "points").mkdir()
    for file in ("checkpoint-10/optimizer.pt", "runs/events", "points/samples.json", "training_args.bin", "notes.md"):
        (folder / file).write_text("/home/me/secret")
    for file in checkpoint.iterdir():
        os.link(file, folder / file.name)
    write_json(folder / "merge_manifest.json", {"from": "/home/me/secret"})
    report = {"data": LEDGER, "steps": 12, "loss_last": 0.25, "reference_cache": "/home/me/my runs/references"}
    manifest = {
        "pipeline": "p", "stage": "sft", "kind": "sft", "key": "k1", "seed": 3, "finished": "2026-01-01",
        "parents": {"mid": "m1"}, "weights": {"mid": 1.0}, "prepared": str(tmp_path / "prepared"),
        "config": {"learning_rate": 1e-4, "suffix": "/think", "lora": {"r": 8}}, "report": report,
        "versions": {"torch": "9.9"}, "files": hashes(folder),
    }  # fmt: skip
    write_json(folder / MANIFEST, manifest)
    mid = {**MID, "weights": {"checkpoint": 1.0}, "report": {"data": LEDGER}, "files": {}}
    write_json(folder.parent / "mid-m1" / MANIFEST, mid)
    return folder


def push(folder, target, *, replace=False, public=False, **settings):
    found = package(folder, target, **settings)
    return put(found, place_of(target, found, public=public), replace=replace)


def header_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_dry_run_writes_nothing_and_asks_nobody(stage, tmp_path, capsys, hub):  # noqa: F811
    before = sorted(tmp_path.rglob("*"))
    hub.repo_info = None  # a call would fail
    with pytest.raises(SystemExit) as end:
        main(["push", "sft", "me/sums"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and sorted(tmp_path.rglob("*")) == sorted([*before, stage / ".verified.json"])
    assert "to        model repository https://huggingface.co/me/sums, private\n" in text
    assert f"{(stage / 'model.safetensors').stat().st_size:,} bytes  model.safetensors\n" in text
    left_out = "checkpoint-10, merge_manifest.json, notes.md, points, runs, training_args.bin"
    assert f"left out  {left_out}\n" in text and "# p sft\n" in text
    assert text.endswith("nothing was written and nobody was asked; --check looks at the target; --yes pushes\n")


def test_what_is_pushed_is_a_checkpoint_of_the_same_key(stage, tmp_path):
    push(stage, f"file://{tmp_path}/out")
    out = tmp_path / "out"
    names = {p.name for p in out.iterdir()}
    assert names == {
        "README.md", MANIFEST, PUSHED, "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not any(b"/home/" in p.read_bytes() or str(tmp_path).encode() in p.read_bytes() for p in out.iterdir())
    manifest = read_json(out / MANIFEST)
    assert manifest["key"] == "k1" and manifest["prepared"] == ".../prepared"
    assert manifest["report"]["reference_cache"] == ".../references" and manifest["config"]["suffix"] == "/think"
    verify(out)  # the hashes are of the files that are there
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not the file that was written"):
        verify(out)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/runs/a", ".../a"), ("/home/John Doe/runs/a b", ".../a b"), ("~/runs/a", ".../a"),
        ("see /data/x/y.json, please", "see .../y.json, please"), ("file:/a/b", "file:/a/b"),
        ("https://host/a/b", "https://host/a/b"), ("/no_think", "/no_think"), ("runs/p/a", "runs/p/a"),
        ("a/b of 1/2", "a/b of 1/2"), ("</think>\n/think", "</think>\n/think"),
    ],
)  # fmt: skip
def test_absolute_paths_are_shortened(text, expected):
    assert without_paths({text: [text, 1]}) == {expected: [expected, 1]}


def test_a_path_in_a_file_that_is_pushed_is_named(stage):
    config = read_json(stage / "config.json") | {"_name_or_path": "/home/me/base"}
    (stage / "config.json").unlink()
    write_json(stage / "config.json", config)
    write_json(stage / MANIFEST, read_json(stage / MANIFEST) | {"files": hashes(stage)})
    assert package(stage).notes == ["config.json names a path of this machine: /home/me/base"]


def test_card_states_what_is_recorded(stage):
    scores = {"think": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 1000}, "cut": {"value": 0.25, "low": None, "n": 4}}
    write_json(stage.parent / "evaluations" / stage.name / "scores.json", {"math": {"scores": scores}})
    card = package(stage, "me/sums").card
    assert header_of(card) == {
        "license": "unknown", "base_model": "org/base", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["smolpost", "sft"],
    }  # fmt: skip
    for line in (
        "| sft | sft | k1 | mid |",
        "| mid | sft | m1 | checkpoint |",
        f"| checkpoint | checkpoint org/base of the Hub | org/base@{'0' * 40} | - |",
        "| sft | a\\|b | 1,200 | 9,000 | 4,500 |",
        "| mid | a\\|b | 1,200 | 9,000 | 4,500 |",
        "| learning_rate | 0.0001 |",
        "| lora.r | 8 |",
        "| loss_last | 0.25 |",
        "| math | think | 0.500 | 0.400 to 0.600 | 1,000 |",
        "| math | cut | 0.250 | - | 4 |",
        "Made with torch 9.9.",
    ):
        assert f"{line}\n" in card, line
    assert "no evaluation is recorded" not in card and "/home/" not in card


def test_card_says_what_it_does_not_know(stage):
    (stage.parent / "mid-m1" / MANIFEST).unlink()
    card = package(stage).card
    assert "base_model" not in header_of(card) and "| mid | its folder is not here | m1 | - |" in card
    assert "No evaluation of this model is recorded." in card
    assert "- How mid was made: only the key is recorded here.\n" in card


def test_weights_of_a_merge_are_those_that_count(stage):
    manifest = read_json(stage / MANIFEST) | {
        "kind": "sweep", "parents": {"mid": "m1", "apo": "a1"}, "weights": {"mid": 1.0, "apo": 1.0},
        "report": {"picked": 0.25, "merge": {"inputs": {"mid": 0.25, "apo": 0.75}}},
    }  # fmt: skip
    write_json(stage / MANIFEST, manifest)
    write_json(stage.parent / "evaluations" / stage.name / "scores.json",
               {"math": {"scores": {"think": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}}}})  # fmt: skip
    card = package(stage).card
    assert "| sft | sweep | k1 | mid x 0.25, apo x 0.75 |" in card and "biased upward" in card


@pytest.mark.parametrize("with_template", [True, False])
def test_the_snippet_of_the_card_runs(stage, capsys, with_template):
    if not with_template:
        (stage / "chat_template.jinja").unlink()
        write_json(stage / MANIFEST, read_json(stage / MANIFEST) | {"files": hashes(stage)})
    snippet = re.search(r"```python\n(.*?)```", package(stage).card, re.DOTALL)[1]
    assert ("enable_thinking=True" in snippet) == with_template
    exec(snippet.replace("THIS_FOLDER_OR_ID", str(stage)).replace("max_new_tokens=256", "max_new_tokens=4"), {})
    assert capsys.readouterr().out


def test_adopted_checkpoint(checkpoint, tmp_path, capsys):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=rf"it has no manifest.json; .* or `smolpost adopt {tmp_path}`"):
        package(tmp_path)
    steps.adopt(tmp_path)
    card = package(tmp_path, license_id="mit").card
    assert header_of(card)["license"] == "mit" and "how it was trained is not recorded" in card
    assert "- How the checkpoint at the start was trained: it came from elsewhere.\n" in card


def test_own_card_and_licence(stage, tmp_path):
    (tmp_path / "mine.md").write_text("---\ntags: [a]\n---\n# Mine\n\n## Licence\n\nNone.\n\n## More\n\nYes.\n")
    card = package(stage, card_file=tmp_path / "mine.md", license_id="apache-2.0").card
    assert header_of(card) == {"license": "apache-2.0", "tags": ["a"]}
    assert "# Mine" in card and "`apache-2.0`" in card and "None." not in card and card.endswith("## More\n\nYes.\n")
    with pytest.raises(UserError, match=r"--card nowhere\.md is not a text file"):
        package(stage, card_file=tmp_path.joinpath("nowhere.md").relative_to(tmp_path))


def test_what_is_no_model_is_named(stage):
    write_json(stage / MANIFEST, read_json(stage / MANIFEST) | {"kind": "init"})
    with pytest.raises(UserError, match="is of kind init, which makes neither a trained model nor synthetic data"):
        package(stage)
    write_json(stage / MANIFEST, read_json(stage / MANIFEST) | {"kind": "sft"})
    with pytest.raises(UserError, match="--no-provenance is for synthetic data"):
        package(stage, with_provenance=False)
    with pytest.raises(UserError, match="hf://datasets/me/sums is not for a model; write hf://me/sums"):
        push(stage, "hf://datasets/me/sums")


def test_model_repository_of_the_hub(stage, hub):  # noqa: F811
    hub.repo_type = "model"
    line = push(stage, "hf://me/sums")
    assert line.startswith("https://huggingface.co/me/sums: model sft of key k1 (") and line.endswith("; private")
    assert b'name = "me/sums"' in hub.files["README.md"] and len(hub.commits) == 1
    assert push(stage, "me/sums").endswith(", as before") and len(hub.commits) == 1


def test_a_file_of_others_with_the_name_of_ours_stays(stage, tmp_path):
    (tmp_path / "out").mkdir()
    for text in ('{"a": 1}', "[]", "text"):
        (tmp_path / "out" / PUSHED).write_text(text)
        with pytest.raises(UserError, match=f"holds {PUSHED}, which `smolpost push` did not write"):
            push(stage, f"file://{tmp_path}/out", replace=True)
        assert (tmp_path / "out" / PUSHED).read_text() == text


@pytest.mark.parametrize("writes", range(10))
def test_an_interrupted_push_leaves_no_model_that_loads(stage, monkeypatch, tmp_path, writes):
    """Killed after so many writes, over the push of another key with shards of its own."""
    out = tmp_path / "out"
    push(stage, f"file://{out}")
    old = json.loads((out / PUSHED).read_text())
    old["files"] = {"model-1-of-2.safetensors": {}, **old["files"]}
    (out / PUSHED).write_text(json.dumps(old | {"key": "k0"}))
    (out / "model-1-of-2.safetensors").write_bytes(b"old")
    write, done = filesystems._put, []

    def stops(system, path, file):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(path)
        write(system, path, file)

    monkeypatch.setattr(filesystems, "_put", stops)
    with pytest.raises(KeyboardInterrupt):
        push(stage, f"file://{out}", replace=True)
    if 0 < writes < 9:
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out)
    monkeypatch.setattr(filesystems, "_put", write)
    push(stage, f"file://{out}", replace=True)  # the same command
    assert not (out / "model-1-of-2.safetensors").exists() and json.loads((out / PUSHED).read_text())["key"] == "k1"
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0
    assert fsspec.filesystem("file").exists(f"{out}/config.json")
