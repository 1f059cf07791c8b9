"""A template whose control tokens the start checkpoint lacks: refused before tokenizing, unless that is meant."""

import json

import pytest

from smolpost import recipe
from smolpost.doctor.checks import diagnose
from smolpost.errors import UserError
from smolpost.pipeline import manifest, steps
from smolpost.pipeline.lineage import Lineage
from tests.model_families import MODEL_FAMILIES
from tests.small import ROOT, sum_rows


def lineage_of(family, folder, *words) -> Lineage:
    start = family.write(folder / "start")
    steps.adopt(start)
    rows = [{"messages": row["chosen"]} for row in sum_rows(4, 0)[::2]]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Lineage(
        recipe.load(
            [
                f"pipeline={ROOT / 'tests' / 'model' / 'family.yaml'}", f"model.checkpoint={start}",
                f"data_root={folder}", f"run_dir={folder / 'runs'}", "stages.sft.template=smollm3",
                *(f"stages.{stage}.template=smollm3" for stage in ("sft_lora", "apo", "apo_lora")), *words,
            ]
        )
    )  # fmt: skip


def test_prepare_refuses_before_it_tokenizes(tmp_path):
    lineage = lineage_of(MODEL_FAMILIES["llama3"], tmp_path)
    stage = lineage.stages["sft"]
    said = r"template=smollm3 writes <\|im_start\|>, <\|im_end\|>, <think>, </think>, .*`smolpost add-tokens"
    with pytest.raises(UserError, match=said):
        steps.prepare(lineage, stage)
    assert not manifest.read(stage.prepared) and not (lineage.root / "tokenized").exists()
    found = {check.name: check for check in diagnose(lineage, stage, rows=2)}["template tokens"]
    assert found.status == "fail" and "4 control tokens of the template are several tokens" in found.detail
    assert found.remedy.endswith("smolpost add-tokens CHECKPOINT OUT --template smollm3")


def test_tags_may_be_trained_as_text_where_replies_still_end(tmp_path):
    spelt = MODEL_FAMILIES["qwen3"]._replace(added=())
    lineage = lineage_of(spelt, tmp_path, "stages.sft.allow_split_tokens=true")
    steps.prepare(lineage, lineage.stages["sft"])
    sources = manifest.read(lineage.stages["sft"].prepared)["report"]["sources"]
    assert sources["chats"]["rows_kept"] == 2
    with pytest.raises(UserError, match=r"<think>, </think>, .* or set stages.sft_lora.allow_split_tokens=true"):
        steps.prepare(lineage, lineage.stages["sft_lora"])
