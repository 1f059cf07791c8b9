"""The doctor's numbers: hand values, and faults that must show."""

import math

import numpy as np
import pytest
import torch

from smolpost.chat.fates import Fate
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.doctor import training_steps
from smolpost.doctor.training_steps import PairSteps, Step, compare, documents, joined, short_documents
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.stages.preference import APOStage
from smolpost.training.environment import Environment

CPU = Environment(rank=0, world_size=1, local_world_size=1, use_cpu=True, bf16=False)


def pack(*lengths, trained=None):
    """A pack of documents of consecutive ids, all of which train but the first of each."""
    ids = np.arange(10, 10 + sum(lengths))
    fates = np.full(len(ids), Fate.TRAINED)
    if trained is not None:
        fates[~np.isin(ids, trained)] = Fate.TEMPLATE
    fates[np.cumsum((0, *lengths))[:-1]] = Fate.FIRST
    return {
        "input_ids": ids,
        "fates": fates,
        "seq_lengths": np.array(lengths),
        "rows": np.arange(len(lengths)),
    }


def test_documents_of_a_pack_join_to_the_pack():
    whole = pack(3, 2, 4)
    parts = documents([whole])
    assert [part["input_ids"].tolist() for part in parts] == [[10, 11, 12], [13, 14], [15, 16, 17, 18]]
    assert [part["rows"].tolist() for part in parts] == [[0], [1], [2]]
    for name, values in joined(parts).items():
        np.testing.assert_array_equal(values, whole[name])


def test_short_documents_are_the_shortest_that_fit():
    assert [len(d["input_ids"]) for d in short_documents([pack(9, 2, 4, 3)], 10)] == [2, 3, 4]


def test_two_long_documents_lose_their_beginning():
    """Ids 10 to 19 of which 15 and 16 train: of at most 4 tokens, the last ones up to 16."""
    found = short_documents([pack(10, trained=[15, 16]), pack(10)], 8)
    assert found[0]["input_ids"].tolist() == [13, 14, 15, 16] and found[0]["fates"].tolist() == [7, 4, 0, 0]
    assert found[0]["seq_lengths"].tolist() == [4]
    assert found[1]["input_ids"].tolist() == [16, 17, 18, 19] and found[1]["fates"].tolist() == [7, 0, 0, 0]


def test_documents_without_a_trained_token_are_left_out():
    assert len(short_documents([pack(3, 3, trained=[11])], 100)) == 1


def step(loss, *gradient):
    return Step(loss, {"w": torch.tensor(gradient)})


def test_compare_says_how_far_apart_two_steps_are():
    same = compare("a", step(2.0, 3.0, 4.0), "b", step(2.0, 3.0, 4.0), CPU)
    assert same.passed and "gradient norm 5 and 5" in same.detail
    off = compare("a", step(2.0, 3.0, 4.4), "b", step(2.0, 3.0, 4.0), CPU)
    assert not off.passed and "largest gradient difference 1.0e-01 of the largest" in off.detail
    assert not compare("a", step(2.1, 3.0, 4.0), "b", step(2.0, 3.0, 4.0), CPU).passed
    assert not compare("a", step(math.nan, 3.0), "b", step(math.nan, 3.0), CPU).passed


THEORY = {"apo_zero": 1.0, "apo_down": 1.0, "sigmoid": 0.6931472, "robust": 0.6931472, "ipo": 25.0}


@pytest.mark.parametrize("loss", THEORY)
def test_theory_has_a_value_for_every_loss(loss):
    stage = APOStage(init_from="x", data="y", max_seq_len=8, global_batch_size=1, loss=loss, beta=0.1, sft_weight=0.5)
    zero = {"rewards/chosen": 0.0, "rewards/rejected": 0.0}
    right, wrong = (step(THEORY[loss] * factor + 0.5 * 3.0, 1.0) for factor in (1, 1.01))
    assert training_steps.loss_at_reference(stage, PairSteps(right, right, zero, 3.0), CPU).passed
    assert not training_steps.loss_at_reference(stage, PairSteps(wrong, wrong, zero, 3.0), CPU).passed
    off = zero | {"rewards/rejected": 0.01}
    assert not training_steps.loss_at_reference(stage, PairSteps(right, right, off, 3.0), CPU).passed


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["abc"], kind="char", vocab_size=256, template="smollm3")


def build(tokenizer, attention, **changes):
    torch.manual_seed(0)
    config = SmolLM3Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), pad_token_id=None, **changes,
    )  # fmt: skip
    config._attn_implementation = attention
    return SmolLM3ForCausalLM(config)


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_every_attention_keeps_packed_documents_apart(tokenizer, attention):
    found = training_steps.packed_equals_unpacked(build(tokenizer, attention), documents([pack(9, 5, 12)]), CPU)
    assert found.passed, found.detail


def test_dropout_is_off_where_two_passes_are_compared(tokenizer):
    model = training_steps.without_dropout(build(tokenizer, "packed", attention_dropout=0.5)).train()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, model(ids).logits, atol=0, rtol=0)


def test_vocabulary_looks_at_the_tokens_in_use(tokenizer):
    model = build(tokenizer, "packed")
    start, end, pad = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|finetune_right_pad_id|>"])
    ids, weight = np.array([start, end, 5, 5]), model.get_input_embeddings().weight.data
    weight[pad] = 0  # is not in use
    found = training_steps.vocabulary(model, tokenizer, ids)
    assert (
        found.passed and f"highest id {len(tokenizer) - 1}" in found.detail and "2 added tokens in use" in found.detail
    )
    unknown = training_steps.vocabulary(model, tokenizer, np.array([start, tokenizer.unk_token_id]))
    assert not unknown.passed and "1 unknown of 2 tokens" in unknown.detail
    weight[start] = 0
    assert "1 with an embedding of 0 (<|im_start|>)" in training_steps.vocabulary(model, tokenizer, ids).detail
