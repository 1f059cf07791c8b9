"""Keys: a result's place changes with all that can change the result, and with nothing else."""

import json
import time

import pytest
from safetensors.torch import load_file, save_file

from smolpost import files, recipe
from smolpost.errors import UserError
from smolpost.pipeline import manifest
from smolpost.pipeline.lineage import Lineage
from smolpost.pipeline.steps import adopt, tokenized
from tests.merging.checkpoints import save_checkpoint

ROW = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "The answer is 2."}]}
PAIR = {
    "prompt": "1+1?",
    "chosen": ROW["messages"],
    "rejected": [ROW["messages"][0], {"role": "assistant", "content": "3"}],
}


@pytest.fixture
def words(tmp_path):
    """The gsm8k pipeline on a folder of three rows a file."""
    for name, row in (("mid", ROW), ("sft", ROW), ("preference", PAIR)):
        (tmp_path / f"smoltalk2_{name}.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    return ["pipeline=gsm8k", f"data_root={tmp_path}", f"run_dir={tmp_path}/runs", "data=gsm8k_folder"]


def keys(words):
    return {name: stage.key for name, stage in Lineage(recipe.load(words)).stages.items()}


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


AFTER_SFT = {"sft", "apo-42", "apo-43", "soup", "merge"}


def test_a_setting_changes_its_stage_and_all_after_it(words):
    assert changed(keys(words), keys([*words, "stages.sft.learning_rate=5e-4"])) == AFTER_SFT
    assert changed(keys(words), keys([*words, "stages.apo.beta=0.1"])) == {"apo-42", "apo-43", "soup", "merge"}
    assert changed(keys(words), keys([*words, "stages.merge.dtype=bfloat16"])) == {"merge"}


def test_what_cannot_change_a_result_changes_no_key(words):
    harmless = [
        "stages.sft.micro_batch_size=2", "stages.sft.logging_steps=1", "stages.sft.save_steps=7", "accelerate=ddp",
        "accelerate.num_processes=1",
        "stages.sft.report_to=[]", "stages.sft.activation_checkpointing=full", "stages.apo.pack_tokens=99",
        "evaluation.tasks.answer.max_rows=3", "evaluation.batch_tokens=99",
    ]  # fmt: skip
    assert keys(words) == keys([*words, *harmless])


@pytest.mark.parametrize(
    "setting",
    ["sources.gsm8k.max_tokens=50", "sources.gsm8k.loss_weight=2", "sources.gsm8k.think_share=1", "hygiene.near=0.8"],
)
def test_the_vocabulary_does_not_hang_on_what_only_training_reads(words, setting):
    assert "init" not in changed(keys(words), keys([*words, f"data.mid.{setting}"]))
    assert "base" in changed(keys(words), keys([*words, f"data.mid.{setting}"]))


def test_what_reads_one_file_of_tasks_does_not_hang_on_the_others(tmp_path):
    words = ["pipeline=tiny", f"run_dir={tmp_path}"]
    after_mid = changed(keys(words), keys([*words, "stages.tasks.files.mid.blocks.chase.rows=10"]))
    assert {"tasks", "mid", "sft", "merge"} <= after_mid
    assert not {"init", "base", "long_context"} & after_mid
    assert "base" in changed(keys(words), keys([*words, "stages.tasks.seed=1"]))


def test_the_order_of_blocks_counts(tmp_path):
    request = recipe.load(["pipeline=tiny", f"run_dir={tmp_path}"])
    before = {name: stage.key for name, stage in Lineage(request).stages.items()}
    base = request.recipe.stages["tasks"].files["base"]
    base.blocks = dict(reversed(base.blocks.items()))
    after = {name: stage.key for name, stage in Lineage(request).stages.items()}
    assert {"tasks", "base"} <= changed(before, after)


def test_data_content_counts_and_its_place_does_not(words, tmp_path):
    before = keys(words)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tmp_path.glob("*.jsonl"):
        (moved / file.name).write_bytes(file.read_bytes())
    assert keys([words[0], f"data_root={moved}", *words[2:]]) == before
    with open(tmp_path / "smoltalk2_preference.jsonl", "a") as file:
        file.write(json.dumps(PAIR | {"source": "new"}) + "\n")
    # The tokenizer is built from the preference rows, too, so here everything hangs on them.
    assert changed(before, keys(words)) == set(before)


def test_seeds_share_prepared_rows(words):
    stages = Lineage(recipe.load(words)).stages
    assert stages["apo-42"].prepared == stages["apo-43"].prepared
    assert stages["apo-42"].key != stages["apo-43"].key
    more = Lineage(recipe.load([*words, "stages.apo.learning_rate=1e-5"])).stages
    assert more["apo-42"].prepared == stages["apo-42"].prepared


def test_a_seeds_key_does_not_hang_on_the_other_seeds(words):
    one = keys([*words, "stages.apo.seeds=[42,7]"])
    assert one["apo-42"] == keys(words)["apo-42"]


def test_a_missing_data_file_is_one_line(words, tmp_path):
    (tmp_path / "smoltalk2_mid.jsonl").unlink()
    with pytest.raises(UserError, match=r"smoltalk2_mid.jsonl: does not exist; expected a JSONL or Parquet file"):
        keys(words)


def test_only_the_stages_that_are_asked_for_are_looked_at(words, tmp_path):
    """Nor is the data of the others."""
    words = [*words, "stages.init.tokenizer_data=[sft]"]
    before = keys(words)["init"]
    (tmp_path / "smoltalk2_preference.jsonl").unlink()
    stages = Lineage(recipe.load(words)).stages
    assert (stages["init"].key, len(stages)) == (before, 9)
    with pytest.raises(UserError, match=r"smoltalk2_preference.jsonl: does not exist"):
        stages["apo-42"]


def test_an_unfinished_parent_is_refused_with_the_remedy(words):
    lineage = Lineage(recipe.load(words))
    with pytest.raises(UserError, match=r"stage init is not finished: .* has no manifest.json; run `smolpost run"):
        lineage.require("init")


def test_a_checkpoint_without_manifest_is_refused_until_adopted(words, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    plain = [*words, f"model.checkpoint={folder}", "stages.base.init_from=checkpoint"]
    with pytest.raises(
        UserError, match=r"has no manifest.json: it is unfinished, or comes from elsewhere; `smolpost adopt"
    ):
        keys(plain)
    with pytest.raises(UserError, match=r"checkpoint has no config\.json"):
        adopt(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"checkpoint is a LoRA adapter .*; merge it into its model first: smolpost me"):
        adopt(folder)
    (folder / "adapter_config.json").unlink()
    save_checkpoint(folder, 0)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "norm" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"checkpoint would not load whole: .* lacks tensor model.layers.0.input_layern"
    ):
        adopt(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    adopt(folder)
    assert Lineage(recipe.load(plain)).stages["base"].parent_keys == {"checkpoint": manifest.read(folder)["key"]}
    before = (folder / "manifest.json").read_bytes()
    adopt(folder)
    assert (folder / "manifest.json").read_bytes() == before
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is not the file that was written"):
        adopt(folder)


# ---------------------------------------------------------------- templates and tokenized rows


def test_another_template_than_the_parents_needs_a_word(words):
    change = ["stages.apo.template=chatml"]
    with pytest.raises(UserError, match=r"stages.apo.template=chatml, but sft was trained with smollm3; set the same"):
        Lineage(recipe.load([*words, *change]))
    allowed = Lineage(recipe.load([*words, *change, "stages.apo.allow_template_change=true"]))
    assert allowed.stages["apo-42"].key != Lineage(recipe.load(words)).stages["apo-42"].key
    with pytest.raises(UserError, match=r"stages.sft.template=smollm3, but mid was trained with chatml"):
        Lineage(recipe.load([*words, "stages.sft.allow_template_change=false"]))


def test_tokenized_rows_are_named_by_what_decides_them_and_nothing_else(words):
    def folder(*more, tokenizer="t"):
        lineage = Lineage(recipe.load([*words, *more]))
        return tokenized(lineage, lineage.stages["sft"], "gsm8k", tokenizer)

    base = folder()
    for same in ("stages.sft.max_seq_len=256", "stages.sft.packing=none", "data.sft.sources.gsm8k.weight=0.5",
                 "stages.sft.learning_rate=1e-5", "data.sft.sources.gsm8k.loss_weight=2", "data.sft.seed=3",
                 "stages.sft.num_workers=1"):  # fmt: skip
        assert folder(same) == base, same
    for other in ("stages.sft.today=1 May 2026", "stages.sft.train_reasoning=false", "stages.sft.last_turn_only=true",
                  "data.sft.sources.gsm8k.max_rows=7", "data.sft.hygiene.exact=true",
                  "data.sft.sources.gsm8k.columns=alpaca"):  # fmt: skip
        assert folder(other) != base, other
    assert folder(tokenizer="u") != base


def test_a_second_command_reads_no_data_file(words, monkeypatch):
    now, read = time.time_ns, []
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)  # the files have not changed just now
    monkeypatch.setattr(files, "sha256", lambda file, own=files.sha256: read.append(file.name) or own(file))
    first = keys(words)
    assert sorted(read) == ["smoltalk2_mid.jsonl", "smoltalk2_preference.jsonl", "smoltalk2_sft.jsonl"]
    assert keys(words) == first and len(read) == 3
