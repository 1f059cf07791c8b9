"""A stage is finished once the model that it wrote scores tokens as the trained one does."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from smolpost.errors import UserError
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.training.environment import Environment
from smolpost.training.round_trip import LIMITS, NUM_TOKENS, check_written, loss_on, probe
from tests.model.conftest import TINY

ALONE = SimpleNamespace(is_world_process_zero=lambda: True)
FP32 = Environment(rank=0, world_size=1, local_world_size=1, use_cpu=True, bf16=False)
BF16 = Environment(rank=0, world_size=1, local_world_size=1, use_cpu=True, bf16=True)
TOKENS = torch.arange(3, 61)[None]


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(SmolLM3Config(**TINY))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def check(folder, loss, environment=FP32):
    return check_written("sft", folder, TOKENS, loss, ALONE, environment, "packed")


def test_the_same_model_passes_and_is_reported(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loss = loss_on(trained, TOKENS)
    report = check(tmp_path, loss)
    assert report == {"trained_loss": loss, "written_loss": pytest.approx(loss, rel=1e-6), "num_tokens": 58}
    assert trained.training  # as it was


def test_the_loss_is_that_of_the_plain_forward(trained):
    logits = trained.eval()(input_ids=TOKENS).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], TOKENS[0, 1:]).item()
    assert loss_on(trained, TOKENS) == pytest.approx(expected, rel=1e-6)


def test_bf16_weights_pass_in_bf16(trained, tmp_path):
    loss = loss_on(trained, TOKENS)
    trained.bfloat16().save_pretrained(tmp_path)
    assert check(tmp_path, loss, BF16)["written_loss"] == pytest.approx(loss, rel=LIMITS["bf16"])


@pytest.mark.parametrize(
    ("environment", "change"),
    [
        (FP32, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].mul_(1.01)),
        (BF16, lambda tensors: tensors["model.embed_tokens.weight"].add_(0.1)),
        (FP32, lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))),
    ],
)
def test_another_model_is_refused_with_both_losses(trained, tmp_path, environment, change):
    trained.save_pretrained(tmp_path)
    loss = loss_on(trained, TOKENS)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        check(tmp_path, loss, environment)
    assert str(caught.value).startswith(f"stages.sft: the model written to {tmp_path} has a loss of ")
    assert f"the trained one has {loss:.6g} (limit of the difference: " in str(caught.value)


def test_another_rope_than_the_trained_one_is_refused(trained, tmp_path):
    """The configuration is read from the folder, too: here one that lost the stage's settings."""
    trained.save_pretrained(tmp_path)
    loss = loss_on(trained, TOKENS)
    SmolLM3Config(**TINY, rope_theta=100.0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has a loss of"):
        check(tmp_path, loss)


def test_a_model_that_would_not_load_whole_is_refused(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the written model would not load whole"):
        check(tmp_path, 4.0)


def test_a_loss_that_is_not_finite_is_training_that_diverged(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"the trained model's loss is nan: training diverged; lower stages\.sft\.learning"
    ):
        check(tmp_path, float("nan"))


def test_the_tokens_are_the_beginning_of_the_rows():
    packs = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 200, "fates": [[0, 0, 0]] * 200})
    assert probe(packs).tolist() == [([1, 2, 3] * 100)[:NUM_TOKENS]]
    pairs = Dataset.from_dict({"prompt_ids": [[1], [5]], "chosen_ids": [[2, 3], [6]], "rejected_ids": [[4], [7]]})
    assert probe(pairs).tolist() == [[1, 2, 3, 5, 6]]
