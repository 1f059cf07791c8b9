"""A Mistral with a sliding window, from a folder of its own, through SFT and APO as users launch them."""

import pytest
import torch
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from smolpost import recipe
from smolpost.doctor.checks import diagnose
from smolpost.pipeline import manifest
from smolpost.pipeline.lineage import Lineage
from smolpost.pipeline.steps import adopt

pytestmark = pytest.mark.slow


@pytest.fixture
def windowed(started, tmp_path):
    """The toy pipeline from a Mistral whose tokens see 16 positions; all documents and most prompts are longer."""
    small, start = started.copy(tmp_path), tmp_path / "mistral"
    tokenizer = AutoTokenizer.from_pretrained(small.folder_of("init"))
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    adopt(start)
    small.words += [f"model.checkpoint={start}", *(f"stages.{stage}.init_from=checkpoint" for stage in ("sft", "apo"))]
    return small


def test_a_mistral_with_a_window_trains(windowed):
    reports = {}
    for stage in ("sft", "apo"):
        done = windowed.launch(stage, "single", 1)
        assert done.returncode == 0, done.stderr
        report = reports[stage] = manifest.read(windowed.folder_of(stage))["report"]
        assert report["written_loss"] == pytest.approx(report["trained_loss"], rel=1e-6)
    assert reports["sft"]["loss_last"] < reports["sft"]["loss_first"]
    assert reports["apo"]["loss_first"] == pytest.approx(1, abs=1e-5) and reports["apo"]["loss_last"] < 1


def test_the_doctor_passes_a_mistral_with_a_window(windowed):
    lineage = Lineage(recipe.load(windowed.words))
    for stage in ("sft", "apo"):
        checks = {check.name: check for check in diagnose(lineage, lineage.stages[stage], rows=12)}
        assert {name: check.detail for name, check in checks.items() if check.status == "fail"} == {}
        assert checks["packing" if stage == "sft" else "pairs"].status == "pass"
