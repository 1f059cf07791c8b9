"""The optimizer's fused kernel, and what training keeps on the disk while it runs."""

import copy

import pytest
import torch

from tests.training.tiny_trainers import build, char_tokenizer, logged, sft_trainer


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


# ---------------------------------------------------------------- AdamW


def test_fused_adamw_equals_the_loop(tokenizer, tmp_path):
    model = build(tokenizer)
    words = {"max_steps": 8, "global_batch_size": 2, "weight_decay": 0.1, "warmup_ratio": 0.0}
    weights = {}
    for optim in ("adamw_torch_fused", "adamw_torch"):
        trainer, _, _ = sft_trainer(tokenizer, tmp_path / optim, copy.deepcopy(model), **words)
        assert trainer.args.optim == "adamw_torch_fused"
        trainer.args.optim = optim
        trainer.train()
        assert trainer.optimizer.optimizer.defaults["fused"] is (True if optim == "adamw_torch_fused" else None)
        weights[optim] = trainer.model.state_dict()
    for name, start in model.state_dict().items():
        fused, loop = (weights[optim][name] for optim in weights)
        torch.testing.assert_close(fused, loop, atol=1e-6, rtol=0)
        assert (fused - start).abs().max() > 1e-4


def test_a_loss_that_is_not_a_number_is_in_the_log(tokenizer, tmp_path, monkeypatch, capsys):
    trainer, _, _ = sft_trainer(tokenizer, tmp_path, build(tokenizer), max_steps=4, global_batch_size=2)
    plain = trainer.pass_loss

    def diverging(*args):
        return plain(*args) * (float("nan") if trainer.state.global_step == 2 else 1)

    monkeypatch.setattr(trainer, "pass_loss", diverging)
    trainer.train()
    assert [entry["loss"] == entry["loss"] for entry in logged(trainer, ["loss"])] == [True, True, False, False]
    assert "'loss': 'nan'" in capsys.readouterr().out
